"""A second place for checkpoints, and which of them stay."""

import errno
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecp_scale.checkpoint import mirror as mirrors
from ecp_scale.checkpoint.folder import RECORD, CheckpointRecord, checkpoints_folder, complete_checkpoints
from ecp_scale.checkpoint.mirror import OWNER, Mirror, copy_checkpoint, held_mirror
from ecp_scale.checkpoint.resuming import find_start
from ecp_scale.checkpoint.retention import Retention, remove_old
from ecp_scale.command_line import parse
from ecp_scale.config import CheckpointConfig, Config
from ecp_scale.errors import InputError
from ecp_scale.training.loop import train
from ecp_scale.zero.state_files import FileRecord, damages
from tests.checkpoint.test_folder import write_checkpoint
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout

SCRIPT = "launch/pretrain_ecp.py"


def hashed_checkpoint(run_folder: Path, step: int) -> Path:
    """A checkpoint whose record has the hash of its file."""
    folder = write_checkpoint(run_folder, step)
    record = CheckpointRecord.read(folder)
    files = {name: FileRecord.of(folder / name) for name in record.files}
    object.__setattr__(record, "files", files)
    record.write(folder)
    return folder


def steps(run_folder: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(run_folder)]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(2), [5, 6]),
        (Retention(2, 3), [3, 5, 6]),
        (Retention(1, 2), [2, 4, 6]),
        (Retention(9, 2), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_newest_and_those_of_every_so_many_steps_stay(
    retention: Retention, left: list[int], tmp_path: Path
) -> None:
    folders = [write_checkpoint(tmp_path, step) for step in range(1, 7)]
    remove_old(folders[-1], retention)
    assert steps(tmp_path) == left
    if retention == Retention(2, 3):
        remove_old(folders[-1], Retention(1), in_use=folders[2])
        assert steps(tmp_path) == [3, 6]


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hashed_checkpoint(tmp_path / "run", 3)
    target = copy_checkpoint(source, tmp_path / "mirror")
    record = CheckpointRecord.read(target)
    assert damages(target, record.files) == []
    assert copy_checkpoint(source, tmp_path / "mirror") == target  # what is there stays
    next(target.glob("*.pt")).write_bytes(b"")
    assert damages(copy_checkpoint(source, tmp_path / "mirror"), record.files) == []
    other = hashed_checkpoint(tmp_path / "other", 3)
    object.__setattr__(record, "tokens", 5)
    record.write(other)
    with pytest.raises(FileExistsError, match="is a checkpoint already"):
        copy_checkpoint(other, tmp_path / "mirror")
    shutil.rmtree(tmp_path / "mirror")
    path = next(source.glob("*.pt"))
    path.write_bytes(b"54321")
    with pytest.raises(InputError, match=r"mp_rank_00_model_states\.pt is damaged"):
        copy_checkpoint(source, tmp_path / "mirror")
    assert complete_checkpoints(tmp_path / "mirror") == []


def test_a_mirror_that_fails_is_said_once_and_the_newest_is_copied_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [hashed_checkpoint(tmp_path / "run", step) for step in range(1, 8)]
    mirror = Mirror(tmp_path / "mirror", Retention(2))
    for folder in folders[:2]:  # the second place is not there
        mirror.copy(folder)
        mirror.finish()
    assert not (tmp_path / "mirror").exists(), "nothing is written where its disk should be"
    owned(tmp_path / "mirror")
    said = capfd.readouterr().err
    assert said.count("is not copied") == 1
    assert "mirror      step-00000001 is not copied" in said
    assert "the run goes on" in said
    begun, go_on = threading.Event(), threading.Event()
    copy = mirrors.copy_checkpoint

    def wait(checkpoint: Path, target: Path, *more: Any) -> Path:
        begun.set()
        assert go_on.wait(30)
        return copy(checkpoint, target, *more)

    monkeypatch.setattr(mirrors, "copy_checkpoint", wait)
    mirror.copy(folders[2])
    assert begun.wait(30)
    assert mirror.current == folders[2]
    for folder in folders[3:]:  # while the third is copied
        mirror.copy(folder)
    go_on.set()
    mirror.finish()
    assert steps(tmp_path / "mirror") == [3, 7]
    assert mirror.current is None


def test_a_mirror_is_waited_for_while_it_gets_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hashed_checkpoint(tmp_path / "run", 1)
    copy, hangs = mirrors.copy_hashed, threading.Event()

    def slow(wait: float) -> Callable[[Path, Path], FileRecord]:
        return lambda *paths: (hangs.wait(wait), copy(*paths))[1]

    monkeypatch.setattr(mirrors, "copy_hashed", slow(1.2))  # of two files: a weight's and the record
    mirror = Mirror(owned(tmp_path / "slow"), Retention())
    mirror.copy(source)
    began = time.monotonic()
    assert mirror.finish(2.0)
    assert time.monotonic() - began > 2.0
    assert steps(tmp_path / "slow") == [1]
    monkeypatch.setattr(mirrors, "copy_hashed", slow(60))
    mirror = Mirror(owned(tmp_path / "hanging"), Retention())
    mirror.copy(source)
    assert not mirror.finish(0.1)
    mirror.abandon()
    hangs.set()
    assert mirror.finish()
    assert list((tmp_path / "hanging" / "checkpoints").iterdir()) == []


def owned(folder: Path) -> Path:
    """A mirror of some run."""
    folder.mkdir()
    (folder / OWNER).write_text("run\n")
    return folder


def test_a_mirror_that_was_full_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [hashed_checkpoint(tmp_path / "run", step) for step in (1, 2, 3)]
    mirror = Mirror(owned(tmp_path / "mirror"), Retention())
    (tmp_path / "mirror" / "checkpoints" / "step-00000001.partial").mkdir(parents=True)  # of a launch that was killed
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "mirror" / "file"))
    copy = mirrors.copy_hashed

    def fails(source: Path, target: Path) -> FileRecord:
        if source.name == RECORD:
            raise full
        return copy(source, target)

    monkeypatch.setattr(mirrors, "copy_hashed", fails)
    for folder in folders[:2]:
        mirror.copy(folder)
        mirror.finish()
        assert list((tmp_path / "mirror" / "checkpoints").iterdir()) == []
    monkeypatch.setattr(mirrors, "copy_hashed", copy)
    mirror.copy(folders[2])
    mirror.finish()
    assert steps(tmp_path / "mirror") == [3]
    assert capfd.readouterr().err.count("mirror/file: No space left on device; the run goes on") == 1


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_checkpoint(tmp_path, step) for step in range(1, 6)]
    remove = shutil.rmtree

    def busy(path: Path, *arguments: object, **options: object) -> None:
        if path.name.startswith("step-00000001"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    for _ in range(2):
        errors = remove_old(folders[-1], Retention(1))
        assert [error.errno for error in errors] == [errno.EBUSY]
        assert steps(tmp_path) == [5]


def test_a_run_that_was_stopped_is_mirrored_when_it_goes_on(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored = f"--checkpoint.mirror={tmp_path / 'mirror'}"
    words = [*map(str, Layout().options(sharded_text, tmp_path / "run")), "--training.steps=2", "--resume=auto"]
    train(parse(words, ""))
    train(parse([*words, mirrored], ""))
    assert steps(tmp_path / "mirror") == [2]

    def busy(*_: object) -> list[OSError]:
        return [OSError(errno.EBUSY, "Device or resource busy", "old")]

    monkeypatch.setattr("ecp_scale.checkpoint.saving.remove_old", busy)
    train(parse([*words[:-2], "--training.steps=3", "--resume=auto", mirrored], ""))  # which ends well
    assert steps(tmp_path / "run") == steps(tmp_path / "mirror") == [2, 3]
    monkeypatch.undo()
    damaged = next((tmp_path / "run" / "checkpoints" / "step-00000003").glob("*_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    copy = tmp_path / "mirror" / "checkpoints" / "step-00000003"
    with pytest.raises(InputError, match=rf"is damaged(?s:.*){copy} is another copy: move .*step-00000003 away"):
        train(parse([*words[:-2], "--training.steps=4", "--resume=auto", mirrored], ""))


def test_a_run_goes_on_from_its_mirror_where_that_has_more(tmp_path: Path) -> None:
    run_folder, mirror = tmp_path / "run", tmp_path / "mirror"
    for step in (1, 2, 3):
        hashed_checkpoint(mirror, step)
    config = Config(checkpoint=CheckpointConfig(mirror=str(mirror)))
    start = find_start(run_folder, True, config)
    assert start.folder == checkpoints_folder(mirror) / "step-00000003"
    with pytest.raises(InputError, match=r"checkpoint\.mirror .*mirror holds checkpoints; pass --resume auto"):
        find_start(run_folder, False, config)
    ours = hashed_checkpoint(run_folder, 3)
    assert find_start(run_folder, True, config).folder == ours
    (ours / "checkpoint.json").write_text("damaged")
    assert find_start(run_folder, True, config).folder == checkpoints_folder(mirror) / "step-00000003"


def test_a_mirror_belongs_to_one_run(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    ours, others = held_mirror(mirror, tmp_path / "a"), held_mirror(mirror, tmp_path / "b")
    with ours, pytest.raises(InputError, match="is being written by process"), held_mirror(mirror, tmp_path / "a"):
        pass
    with (
        pytest.raises(InputError, match=r"has the checkpoints of .*/a, expected those of .*/b; give every run"),
        others,
    ):
        pass
    with held_mirror(mirror, tmp_path / "a"):
        pass
    hashed_checkpoint(tmp_path / "another", 3)
    with (
        pytest.raises(InputError, match=r"another has the checkpoints of a run that it does not name, expected .*/a;"),
        held_mirror(tmp_path / "another", tmp_path / "a"),
    ):
        pass
    with (
        pytest.raises(InputError, match="is the run folder itself or in it"),
        held_mirror(tmp_path / "a" / "checkpoints", tmp_path / "a"),
    ):
        pass


def test_a_run_is_mirrored_and_goes_on_to_the_bit_when_its_folder_is_gone(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    layout = Layout(data=2, zero=1)
    mirrored = f"--checkpoint.mirror={tmp_path / 'mirror'}"

    def words(folder: str, last: int, *more: str) -> list[str]:
        options = [*layout.options(sharded_text, tmp_path / folder), f"--training.steps={last}", *more]
        often = ["--checkpoint.every_steps=2", "--checkpoint.keep_last=1", "--optimizer.schedule=constant"]
        return [*options, *often, "--resume=auto"]

    run_successfully(SCRIPT, *words("run", 4, mirrored), ranks=2)
    assert steps(tmp_path / "run") == steps(tmp_path / "mirror") == [4]
    shutil.move(tmp_path / "run", tmp_path / "stayed")
    run_successfully(SCRIPT, *words("run", 6, mirrored), ranks=2)
    assert steps(tmp_path / "run") == steps(tmp_path / "mirror") == [6]
    run_successfully(SCRIPT, *words("stayed", 6), ranks=2)
    found = [[(line["step"], line["loss"]) for line in metrics(tmp_path / name)] for name in ("stayed", "run")]
    assert found[0][4:] == found[1]
    assert [step for step, _ in found[1]] == [5, 6]


def test_a_mirror_that_cannot_be_written_is_refused_at_the_start(sharded_text: ShardedText, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [*map(str, Layout().options(sharded_text, tmp_path / "run")), f"--checkpoint.mirror={tmp_path / 'file'}"]
    with pytest.raises(InputError, match=r"checkpoint\.mirror .*file"):
        train(parse(words, ""))
