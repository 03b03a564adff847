"""Plans and rehearsals stay on the CPU of a machine that has a GPU, which is played by torch.cuda's answers."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ecp_scale.command_line import load_preset, parse
from ecp_scale.errors import InputError
from ecp_scale.planning import compiled, rehearsal
from ecp_scale.planning.tracing import trace


def test_a_layout_is_traced_beside_a_gpu_as_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_preset("scaled-125m")
    model = dataclasses.replace(config.model, layers=2, vocab_size=1000, allow_short_receptive_field=True)
    parallel = dataclasses.replace(config.parallel, tensor=2, sequence=True)
    config = dataclasses.replace(config, model=model, parallel=parallel)
    alone = trace(config, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: pytest.fail("took the GPU"))
    assert trace(config, 2) == alone
    assert torch.cuda.current_device() == 0


def test_a_rehearsal_shows_its_ranks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(words: list[str], **named: Any) -> Any:
        seen.update(named["env"])
        return subprocess.CompletedProcess(words, 1, "", "not run")

    monkeypatch.setattr(rehearsal.subprocess, "run", run)
    request = parse(["--config", "scaled-125m", "--model.vocab_size=1000"], "", world_size=2)
    with pytest.raises(InputError, match="not run"):
        rehearsal.rehearse(request)
    assert seen["CUDA_VISIBLE_DEVICES"] == ""


def test_every_module_that_compiles_is_planned_so() -> None:
    package = Path(compiled.__file__).parent.parent
    texts = {path.stem: path.read_text() for path in package.rglob("*.py")}
    callers = {name for name, text in texts.items() if "maybe_compile(" in text and name != "compiled"}
    assert callers - {"pointwise"} == {module.__name__.rpartition(".")[2] for module in compiled.MODULES}
