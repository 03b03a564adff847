"""The doctor, times by the device's own clock, and going back from a spike, on a GPU."""

from pathlib import Path

import pytest
import torch

from ecp_scale.parallel.device import Stopwatch
from ecp_scale.training.events import read_events
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.training.test_spikes import PASSED, ROLLED, corrupted, words


def test_a_stopwatch_tells_what_the_device_took() -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(4096, 4096, device=device)
    watch = Stopwatch(device)
    for _ in range(3):
        with watch.running():
            for _ in range(20):
                x = x @ x
                x = x / x.norm()
    torch.cuda.synchronize()
    found = watch.seconds
    assert 1e-4 < found < 60
    with watch.running():
        x = x @ x
    torch.cuda.synchronize()
    assert watch.seconds > found


def test_a_host_with_a_gpu_is_well(tmp_path: Path) -> None:
    said = run_successfully("launch/doctor.py", "--folder", tmp_path, gpu=True)
    assert "NCCL" in said
    assert "all is well: 1 host" in said


@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_goes_back_from_a_spike(sharded_text: ShardedText, tmp_path: Path, zero: int) -> None:
    prefix = corrupted(sharded_text, tmp_path / "shards")
    for name, more in (("rolled", ROLLED), ("known", (f"--training.skip_samples={PASSED}",))):
        asked = words(sharded_text, prefix, tmp_path / name, *more, zero=zero)
        run_successfully("launch/pretrain_ecp.py", *asked, gpu=True)
    assert [event["event"] for event in read_events(tmp_path / "rolled")].count("rolled back") == 1
    rolled, known = ([record["loss"] for record in metrics(tmp_path / name)] for name in ("rolled", "known"))
    # FlashAttention adds gradients of keys in any order.
    assert rolled == pytest.approx(known, rel=1e-3)
