"""Checkpoints that earlier versions have written go on as those versions went on.

tests/golden/checkpoints/format-N.tar.xz is a run of four steps by the version that wrote format N: its checkpoint after
two, its shards, and the losses of all four.
"""

import json
import tarfile
from pathlib import Path

import pytest

from ecp_scale.checkpoint import tools
from ecp_scale.checkpoint.folder import READABLE, CheckpointRecord, find_checkpoint
from ecp_scale.command_line import parse
from ecp_scale.training.loop import train
from tests.launching import ROOT, metrics, run_successfully

GOLDEN = ROOT / "tests" / "golden" / "checkpoints"


@pytest.fixture(params=READABLE)
def version(request: pytest.FixtureRequest, tmp_path: Path) -> int:
    """A format version, whose run is in ``tmp_path``."""
    with tarfile.open(GOLDEN / f"format-{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return int(request.param)


def words(folder: Path, *more: str) -> list[str]:
    """The run of a golden checkpoint, to its fourth step."""
    paths = [f"--data.prefix={folder / 'shards' / 'text'}", f"--training.output_dir={folder / 'run'}"]
    return [f"--config={folder / 'run.yaml'}", *paths, "--resume=auto", *more]


def check(folder: Path, tolerance: float = 1e-4) -> None:
    """The last two losses are those of the version that wrote the checkpoint, up to what processors round in bf16.

    Without the moments of the checkpoint they are others by more than a hundredth.
    """
    expected = json.loads((folder / "losses.json").read_text())
    found = {str(record["step"]): record["loss"] for record in metrics(folder / "run")}
    assert found == pytest.approx({step: expected[step] for step in ("3", "4")}, rel=tolerance)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_every_format_goes_on(stage: int, version: int, tmp_path: Path) -> None:
    """In the layout that wrote it, and in another one."""
    content = json.loads((find_checkpoint(tmp_path / "run") / "checkpoint.json").read_text())
    assert content["format_version"] == version
    train(parse(words(tmp_path, f"--deepspeed_config=zero{stage}"), ""))
    check(tmp_path)


def test_a_checkpoint_of_every_format_is_converted_and_listed(version: int, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(tmp_path / "run")
    lines: list[str] = []
    assert tools.describe(tmp_path / "run", lines.append)
    assert tools.verify(tmp_path / "run", lines.append)
    assert ("deepspeed" in lines[0]) == (version >= 7)
    assert ("without a hash" in lines[1]) == (version < 5)
    assert not tools.difference(checkpoint, tmp_path / "run", lines.append)
    assert CheckpointRecord.read(checkpoint).step == 2


def test_the_newest_format_goes_on_on_two_ranks(tmp_path: Path) -> None:
    with tarfile.open(GOLDEN / f"format-{READABLE[-1]}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    layout = ("--training.micro_batch_size=1", "--deepspeed_config=zero2")
    run_successfully("launch/pretrain_ecp.py", *words(tmp_path, *layout), ranks=2)
    check(tmp_path, tolerance=1e-3)  # gradients of bf16 are added in bf16
