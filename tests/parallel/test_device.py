"""Devices that cannot be used are refused by name; GPUs are played by torch.cuda's answers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ecp_scale.errors import InputError
from ecp_scale.parallel import device
from ecp_scale.parallel.device import check_precision, gpu_identity, keep_kernels_in_order, local_device, set_tf32

GPU = torch.device("cuda", 0)


def play(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """Let torch.cuda answer so."""
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def test_each_rank_takes_its_gpu_or_the_only_one_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # which it would set for good
    play(monkeypatch, is_available=True, device_count=4, set_device=None)
    assert local_device(3) == torch.device("cuda", 3)
    play(monkeypatch, device_count=1)
    assert local_device(3) == torch.device("cuda", 0)
    play(monkeypatch, device_count=2)
    with pytest.raises(InputError, match=r"local rank 3 on host .* shows 2 GPUs; start one per GPU"):
        local_device(3)


def test_a_gpu_without_bf16_is_refused_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, get_device_capability=(7, 5), get_device_name="Tesla T4")
    with pytest.raises(InputError, match=r"training\.precision is bf16, but Tesla T4 on host .* has no bf16"):
        check_precision(GPU, "bf16")
    check_precision(GPU, "fp32")
    check_precision(torch.device("cpu"), "bf16")
    play(monkeypatch, get_device_capability=(8, 0))
    check_precision(GPU, "bf16")


def test_a_driver_that_torch_cannot_use_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(device, "DRIVER", tmp_path)
    play(monkeypatch, is_available=False)
    with pytest.raises(
        InputError, match=r"has an NVIDIA driver, but torch .* too old \(found version 11040\)\.; install"
    ):
        local_device(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_device(0).type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(device, "DRIVER", tmp_path / "absent")
    assert local_device(0).type == "cpu"


def test_gpus_are_told_apart_and_cpus_may_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, get_device_properties=SimpleNamespace(uuid="1234"))
    assert gpu_identity(GPU) == "1234"
    assert gpu_identity(torch.device("cpu")) == ""


def test_tf32_is_what_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        before = backend.allow_tf32
        for allowed in (True, False):
            set_tf32(allowed)
            assert backend.allow_tf32 is allowed
        backend.allow_tf32 = before


def test_kernels_start_in_order_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.CONNECTIONS, "")  # so that what is set below is undone
    monkeypatch.delenv(device.CONNECTIONS)
    assert keep_kernels_in_order() is None
    assert os.environ[device.CONNECTIONS] == "1"
    monkeypatch.setenv(device.CONNECTIONS, "8")
    assert "is 8: messages of tensor parallelism may not hide" in (keep_kernels_in_order() or "")
    assert os.environ[device.CONNECTIONS] == "8"
    monkeypatch.delenv(device.CONNECTIONS)
    play(monkeypatch, is_initialized=True)
    assert "is not set, and CUDA has started" in (keep_kernels_in_order() or "")


def test_a_thread_asks_for_what_is_done_on_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    standing: list[torch.device] = []
    asked: list[list[torch.device]] = []

    @contextmanager
    def on(of: torch.device) -> Iterator[None]:
        standing.append(of)
        yield
        standing.pop()

    class Event:
        fails = False

        def record(self) -> None:
            pass

        def query(self) -> bool:
            asked.append(list(standing))
            if self.fails:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return True

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu = torch.device("cuda", 3)
    is_done = device.done_so_far(gpu)
    assert is_done()
    assert asked == [[gpu]]
    monkeypatch.setattr(Event, "fails", True)
    assert not is_done()


def test_a_share_of_the_peak_is_of_that_of_the_products_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, get_device_name="NVIDIA H100 80GB HBM3")
    peaks = [device.known_peak_teraflops(GPU, *kind) for kind in (("bf16", True), ("fp32", False), ("fp32", True))]
    assert peaks == [989.0, 67.0, 494.5]
    play(monkeypatch, get_device_name="another")
    assert device.known_peak_teraflops(GPU, "fp32", True) is None
    assert device.known_peak_teraflops(torch.device("cpu"), "bf16") is None
