"""What a run refuses before it makes anything."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ecp_scale.command_line import load_preset
from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.training.starting import check_compiler

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
