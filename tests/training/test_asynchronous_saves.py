"""Checkpoints that are written behind the training are those that would have been written in front of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from ecp_scale.checkpoint.folder import complete_checkpoints
from ecp_scale.checkpoint.saving import Progress, Saves
from ecp_scale.cluster.signals import STOP
from ecp_scale.command_line import parse
from ecp_scale.training import loop
from ecp_scale.training.loop import train
from ecp_scale.training.step import DivergedError, StepResult
from ecp_scale.zero.checkpoint_engine import CLASSES, CheckpointFiles, HostCopies
from ecp_scale.zero.state_files import read_states
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout
from tests.training.test_agreement import odd_launch

LAYOUTS = [
    Layout(tensor=2, zero=0),
    Layout(data=2, zero=1),
    Layout(data=2, zero=1, precision="bf16"),
    Layout(data=2, zero=3),
    Layout(data=2, zero=3, precision="bf16"),
    Layout(data=2, zero=2, offload=True),
]


def options(layout: Layout, text: ShardedText, output: Path, *more: str) -> list[str]:
    """Eight steps, of which every third is saved."""
    return [*layout.options(text, output), "--training.steps=8", "--checkpoint.every_steps=3", *more]


def leaves(file: Path) -> list[Any]:
    """Everything that a file holds, without the config, which says how it was written."""
    content = {key: value for key, value in read_states(file, "cpu", CLASSES).items() if key != "ds_config"}
    return [
        vars(leaf) if hasattr(leaf, "__dict__") and not isinstance(leaf, torch.Tensor) else leaf
        for leaf in tree_flatten(content)[0]
    ]


@pytest.fixture(scope="module")
def waiting(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of every layout that saves in front of the training, of one launch."""
    folder = tmp_path_factory.mktemp("waiting")
    listed = [{"options": options(one, sharded_text, folder / str(one)), "probed": False} for one in LAYOUTS]
    (folder / "jobs.json").write_text(json.dumps(listed))
    run_successfully("tests/parallel/train_layouts.py", folder / "jobs.json", ranks=2)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_saved_behind_the_training_is_what_was_there(
    layout: Layout, waiting: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = options(layout, sharded_text, tmp_path / "goes-on", "--checkpoint.asynchronous=true")
    done = odd_launch("slow", *words)
    assert done.returncode == 0, done.stderr
    assert "step 3  saved " in done.stderr
    assert " s later, copied in " in done.stderr
    # A second is more than steps take: the training has gone on meanwhile, and waits for a save before the next.
    assert done.stderr.index("step 4/8") < done.stderr.index("step 3  saved ")
    assert "step 8  waits for the save of step 6" in done.stderr
    runs = (waiting / str(layout), tmp_path / "goes-on")
    losses = [[record["loss"] for record in metrics(run)] for run in runs]
    assert losses[0] == losses[1]
    found = [complete_checkpoints(run) for run in runs]
    assert [path.name for path in found[0]] == [path.name for path in found[1]]
    for expected, folder in zip(*found, strict=True):
        for file in expected.glob("*_states.pt"):
            pairs = zip(leaves(file), leaves(folder / file.name), strict=True)
            for one, other in pairs:
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("reaction", ["continue", "stop"])
def test_an_error_of_the_writer_stops_the_run_at_the_next_step_or_is_said(
    reaction: str, sharded_text: ShardedText, tmp_path: Path
) -> None:
    layout, more = Layout(data=2, zero=1), ("--checkpoint.asynchronous=true", f"--checkpoint.on_failed_save={reaction}")
    done = odd_launch("full", *options(layout, sharded_text, tmp_path / "run", *more))
    assert "step 3: not saved" in done.stderr if reaction == "stop" else "step 3  not saved" in done.stderr
    assert "rank 1 on host" in done.stderr
    assert "No space left on device" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert done.returncode != 0  # the last save counts
    steps = len(metrics(tmp_path / "run"))
    assert steps in (4, 5) if reaction == "stop" else steps == 8


def test_copies_share_what_their_tensors_share_and_use_their_memory_again() -> None:
    copies = HostCopies()
    flat = torch.arange(10.0)
    states = {"flat": flat, "views": [flat[2:5], flat[5:].view(5, 1)], "shape": torch.Size([3]), "number": 7}
    copies.begin()
    first = copies.of(states)
    flat.add_(100)
    assert first["views"][0].tolist() == [2, 3, 4]
    assert first["views"][1].shape == (5, 1)
    assert type(first["shape"]) is torch.Size
    assert len({view.untyped_storage().data_ptr() for view in (first["flat"], *first["views"])}) == 1
    memory = first["flat"].data_ptr()
    copies.begin()
    second = copies.of(states)
    assert second["flat"].data_ptr() == memory
    assert second["views"][0].tolist() == [102, 103, 104]


def test_a_writer_that_has_failed_says_so_when_it_is_asked(tmp_path: Path) -> None:
    files = CheckpointFiles(asynchronous=True)
    files.create(None)
    files.save({"weight": torch.zeros(3)}, str(tmp_path / "nowhere" / "a.pt"))
    files.save({"weight": torch.zeros(3)}, str(tmp_path / "b.pt"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.pt"):
        files.written()
    assert files.has_failed
    assert not (tmp_path / "b.pt").exists()
    files.create(None)
    files.save({"weight": torch.zeros(3)}, str(tmp_path / "b.pt"))
    assert [*files.written()] == ["b.pt"]


def test_a_copy_that_fails_is_told_as_a_write_that_fails_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = CheckpointFiles(asynchronous=True)
    files.create(None)
    monkeypatch.setattr(HostCopies, "of", lambda self, states: (_ for _ in ()).throw(MemoryError("no room")))
    files.save({"weight": torch.zeros(3)}, str(tmp_path / "a.pt"))
    assert files.has_failed
    with pytest.raises(MemoryError):
        files.written()


def test_a_request_to_stop_in_the_step_that_is_saved_leaves_its_checkpoint(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes behind the message that would have told of it, and the save has begun behind the training."""
    begin = Saves.begin

    def interrupted(self: Saves, done: Progress, probe_loss: float | None = None) -> None:
        begin(self, done, probe_loss)
        (tmp_path / "run" / STOP).touch()

    monkeypatch.setattr(Saves, "begin", interrupted)
    words = [*map(str, options(Layout(), sharded_text, tmp_path / "run")), "--checkpoint.asynchronous=true"]
    train(parse(words, ""))
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-00000003"]
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped["checkpoint"].endswith("step-00000003")


def test_a_run_that_diverges_leaves_the_save_that_has_begun(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = loop.optimizer_step, []

    def diverging(*arguments: Any, **named: Any) -> StepResult:
        calls.append(1)
        if len(calls) == 4:
            raise DivergedError("the loss is nan")
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "optimizer_step", diverging)
    monkeypatch.setattr(loop.Checkpoints, "heard", lambda self, written, failed: None)  # the disk is slow
    words = [*map(str, options(Layout(), sharded_text, tmp_path / "run")), "--checkpoint.asynchronous=true"]
    with pytest.raises(DivergedError, match=r"step 4: the loss is nan; last checkpoint: .*step-00000003"):
        train(parse(words, ""))
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-00000003"]
