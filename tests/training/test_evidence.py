"""What a launch leaves for whoever looks for a fault."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity

from ecp_scale.cluster import last_words
from ecp_scale.cluster.last_words import before_leaving, say_last_words
from ecp_scale.parallel.groups import Groups
from ecp_scale.training import evidence, profiling
from ecp_scale.training.evidence import ALIVE, Alive, kept_evidence


def test_last_words_are_said_whatever_happens_and_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(last_words, "PATIENCE_SECONDS", 0.2)
    with before_leaving(lambda: 1 / 0), before_leaving(lambda: said.append(1)), before_leaving(lambda: time.sleep(9)):
        began = time.monotonic()
        say_last_words()
        assert time.monotonic() - began < 5
    assert said == [1]
    say_last_words()
    assert said == [1]


def test_what_holds_the_memory_is_written_where_there_is_too_little(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("blocks"))
    with pytest.raises(torch.OutOfMemoryError), kept_evidence(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
    path = tmp_path / "profile" / "out-of-memory-rank-0.pickle"
    assert path.read_text() == "blocks"
    assert f"evidence    what holds the memory of rank 0: {path}" in capsys.readouterr().err


def test_steps_on_a_gpu_are_profiled_with_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[object] = []
    profiler = SimpleNamespace(
        start=lambda: done.append("start"),
        stop=lambda: done.append("stop"),
        export_chrome_trace=lambda path: Path(path).write_text("trace"),
    )
    monkeypatch.setattr(profiling, "profile", lambda activities, record_shapes: done.append(activities) or profiler)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all": done.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("blocks"))
    with profiling.profiled(tmp_path, (2, 3), torch.device("cuda")) as begin:
        for step in range(1, 6):
            done.append(step)
            begin(step)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    assert done == [activities, 1, 2, "all", "start", 3, 4, "stop", None, 5]
    names = [tmp_path / "profile" / f"steps-2-3.{kind}" for kind in ("json", "pickle")]
    assert [name.read_text() for name in names] == ["trace", "blocks"]
    assert f"profile     {names[0]}" in capsys.readouterr().err
    with profiling.profiled(tmp_path, (7, 9), torch.device("cuda")) as begin:
        begin(6)
    assert "none: logging.profile_steps is [7, 9], and no such step was done" in capsys.readouterr().err


def test_a_run_says_now_and_then_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Alive(tmp_path, steps=4)

    def step(number: int) -> int:
        alive.step({"time": 1.0, "step": number, "tokens": 64, "loss": 5.0, "step_seconds": 0.1, "lr": 1.0})
        return int(json.loads((tmp_path / ALIVE).read_text())["step"])

    assert [step(number) for number in (1, 2)] == [1, 1]
    monkeypatch.setattr(evidence, "ALIVE_SECONDS", 0.0)
    assert step(3) == 3
    monkeypatch.undo()
    assert step(4) == 4  # the last one
    (tmp_path / ALIVE).unlink()
    (tmp_path / ALIVE).mkdir()
    alive.step({"time": 1.0, "step": 4, "tokens": 64, "loss": 5.0, "step_seconds": 0.1})


def test_what_is_for_an_end_at_once_is_not_done_where_an_error_is_raised() -> None:
    done: list[str] = []
    with before_leaving(lambda: done.append("always")), before_leaving(lambda: done.append("at exit"), at_exit=True):
        say_last_words()
        assert done == ["always"]
        say_last_words(is_exit=True)
    assert done == ["always", "always", "at exit"]
    say_last_words(is_exit=True)
    assert len(done) == 3
