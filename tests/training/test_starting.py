"""What a run refuses before it makes anything."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ecp_scale.command_line import load_preset
from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.training.starting import check_compiler, choose_flash

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def compiling(choice: object) -> Config:
    """A config whose ``training.compile`` says so."""
    config = load_preset("demo")
    return dataclasses.replace(config, training=dataclasses.replace(config.training, compile=choice))


def test_a_host_without_a_compiler_is_refused_where_something_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    for choice, device in ((False, CPU), (False, GPU), ("auto", CPU)):
        check_compiler(compiling(choice), device)
    with pytest.raises(InputError, match=r"has no g\+\+: install one, let CXX name one, or set training"):
        check_compiler(compiling(True), CPU)
    for choice in (True, "auto"):
        with pytest.raises(InputError, match="has no gcc or clang: install one, let CC name one"):
            check_compiler(compiling(choice), GPU)
    for name, variable, on in (("clang++", "CXX", CPU), ("clang", "", GPU), ("own", "CC", GPU)):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        if variable:
            monkeypatch.setenv(variable, name)
        check_compiler(compiling(True), on)
    monkeypatch.setenv("CC", "nowhere")
    with pytest.raises(InputError, match="has no nowhere"):
        check_compiler(compiling(True), GPU)


def asking(name: str, dropout: float = 0.0, precision: str = "bf16", backend: str = "auto") -> Config:
    """A config that asks for a FlashAttention."""
    config = load_preset("scaled-125m")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=dropout),
        training=dataclasses.replace(config.training, flash_attention=name, precision=precision),
        attention=dataclasses.replace(config.attention, backend=backend),
    )


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is put in the place of torch's FlashAttention, on a Hopper."""
    found: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", found.append, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return found


def test_the_flash_attention_that_is_asked_for_is_put_in_place_on_a_gpu(put: list[str]) -> None:
    choose_flash(asking("torch"), GPU)
    choose_flash(asking("FA3"), CPU)
    assert put == []
    choose_flash(asking("FA3"), GPU)
    choose_flash(asking("FA4", backend="flash"), GPU)
    assert put == ["FA3", "FA4"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (asking("FA3", dropout=0.05), "has no dropout, and model.dropout is 0.05"),
        (asking("FA3", precision="fp32"), "takes bf16, and training.precision is fp32"),
        (asking("FA4", backend="sdpa"), "is not used by attention.backend sdpa"),
    ],
)
def test_one_that_does_not_serve_the_run_is_refused(config: Config, reason: str, put: list[str]) -> None:
    with pytest.raises(InputError, match=f"flash_attention is FA[34], which {reason}; use torch"):
        choose_flash(config, GPU)
    assert put == []


def test_one_that_does_not_serve_the_machine_is_refused(put: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'flash_attn_interface'")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", absent)
    with pytest.raises(InputError, match="cannot be had: its package cannot be loaded: No module named 'flash_attn"):
        choose_flash(asking("FA3"), GPU)
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(InputError, match=r"cannot be had: it needs torch 2\.11, found "):
        choose_flash(asking("FA4"), GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"serves GPUs of capability 9\.0, found 8\.0"):
        choose_flash(asking("FA3"), GPU)
