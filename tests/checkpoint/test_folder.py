"""What counts as a complete checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from ecp_scale.checkpoint.folder import (
    FORMAT_VERSION,
    CheckpointRecord,
    begin,
    checkpoints_folder,
    complete_checkpoints,
    find_checkpoint,
    newest_complete,
    publish,
    signed,
    tag,
)
from ecp_scale.checkpoint.resuming import find_start
from ecp_scale.checkpoint.retention import Retention, remove_old
from ecp_scale.config import Config
from ecp_scale.data.manifest import TokenizerRecord
from ecp_scale.errors import InputError
from ecp_scale.parallel.partition import Partition
from ecp_scale.zero.state_files import FileRecord


def write_checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    """A checkpoint with one small file."""
    folder = checkpoints_folder(run) / tag(step)
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"12345")
    record = CheckpointRecord(
        step=step,
        tokens=step * 10,
        data_digest="0" * 16,
        skipped_steps=0,
        world_size=1,
        tensor_parallel=1,
        zero_stage=0,
        precision="fp32",
        model={},
        attention={},
        data={},
        tokenizer=TokenizerRecord("sentencepiece", "tokenizer.model", "0" * 64, 10, 1),
        tokenizer_file="tokenizer.model",
        partitions={"weight": Partition(0, 7)},
        files={"mp_rank_00_model_states.pt": FileRecord(5, "0" * 32)},
    )
    if complete:
        record.write(folder)
        assert CheckpointRecord.read(folder) == record
    return folder


def test_the_newest_complete_checkpoint_is_in_charge(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 6, complete=False)
    assert find_checkpoint(tmp_path).name == "step-00000004"
    with pytest.raises(InputError, match="not a complete checkpoint"):
        find_checkpoint(checkpoints_folder(tmp_path) / "step-00000006")


@pytest.mark.parametrize("damage", ["short", "gone"])
def test_a_damaged_file_makes_a_checkpoint_incomplete(tmp_path: Path, damage: str) -> None:
    folder = write_checkpoint(tmp_path, 2)
    file = folder / "mp_rank_00_model_states.pt"
    file.unlink() if damage == "gone" else file.write_bytes(b"123")
    with pytest.raises(InputError, match=r"mp_rank_00_model_states\.pt (is missing|has 3 bytes, expected 5)"):
        CheckpointRecord.read(folder)
    with pytest.raises(InputError, match=r"only incomplete ones: .*step-00000002"):
        find_checkpoint(tmp_path)


def test_folders_that_hold_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match="expected a complete checkpoint, found nothing"):
        find_checkpoint(tmp_path)


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 2)
    (folder / "checkpoint.json").write_text(json.dumps(signed({"format_version": FORMAT_VERSION})))
    with pytest.raises(InputError, match="not the record of a checkpoint"):
        CheckpointRecord.read(folder)


def test_old_checkpoints_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 9, complete=False)
    folder = checkpoints_folder(tmp_path)
    for name in ("step-00000001.partial", "step-00000009.partial"):  # of saves that were cut short
        (folder / name).mkdir()
    archive = tmp_path / "archive"
    write_checkpoint(archive, 2)
    for name in ("step-00000001-best", "step-00000002.bak", "best", "step-1"):
        shutil.copytree(folder / "step-00000003", folder / name)
    (folder / "step-00000000").symlink_to(checkpoints_folder(archive) / "step-00000002")
    (folder / "step-00000005").write_text("a file of the user's")
    (folder / "step-00000000.partial").symlink_to(checkpoints_folder(archive) / "step-00000002")
    foreign = {path.name for path in folder.iterdir()} - {f"step-0000000{step}" for step in (1, 2)}
    remove_old(complete_checkpoints(tmp_path)[-1], Retention(keep_last=2))
    assert {path.name for path in folder.iterdir()} == foreign - {"step-00000001.partial"}
    assert CheckpointRecord.read(checkpoints_folder(archive) / "step-00000002").step == 20 // 10
    found, passed = newest_complete(tmp_path)
    assert found is not None
    assert found.name == "step-00000004"
    assert len(passed) == 2
    assert "step-00000009: not a complete checkpoint" in passed[0]
    assert "step-00000009.partial: its save was cut short" in passed[1]


def test_where_all_checkpoints_stay_none_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = [write_checkpoint(tmp_path, step) for step in (1, 2)][-1]
    partial = checkpoints_folder(tmp_path) / "step-00000001.partial"
    partial.mkdir()
    monkeypatch.setattr(CheckpointRecord, "read", pytest.fail)
    remove_old(newest, Retention())
    assert not partial.exists()


def test_nothing_is_written_over_a_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 2)
    with pytest.raises(FileExistsError, match="nothing is written over one"):
        begin(folder)
    torn = write_checkpoint(tmp_path, 4, complete=False)
    partial = begin(torn)
    assert partial.name == "step-00000004.partial"
    assert (torn.with_name("step-00000004.incomplete-1") / "mp_rank_00_model_states.pt").exists()
    CheckpointRecord.read(folder).write(partial)
    publish(partial)
    assert torn.is_dir()
    assert not partial.exists()


def test_a_cut_first_save_is_passed_by_and_the_run_starts_over(tmp_path: Path) -> None:
    (checkpoints_folder(tmp_path) / "step-00000002.partial").mkdir(parents=True)
    for resuming in (True, False):
        start = find_start(tmp_path, resuming, Config())
        assert start.folder is None
        assert start.progress.step == 0
        assert start.passed_by == (f"{checkpoints_folder(tmp_path)}/step-00000002.partial: its save was cut short",)
    write_checkpoint(tmp_path, 1, complete=False)
    assert find_start(tmp_path, True, Config()).folder is None
    damaged = write_checkpoint(tmp_path, 3) / "checkpoint.json"
    before = damaged.read_text()
    damaged.write_text(before.replace('"tokens": 30', '"tokens": 90'))
    for resuming in (True, False):
        with pytest.raises(
            InputError, match=r"the run can go on from none of its checkpoints(.|\n)*step-00000003(.|\n)*is damaged"
        ):
            find_start(tmp_path, resuming, Config())
    damaged.write_text(before)
    write_checkpoint(tmp_path, 4)
    with pytest.raises(InputError, match="holds checkpoints; pass --resume auto"):
        find_start(tmp_path, False, Config())
    assert find_start(tmp_path, True, Config()).progress.step == 4
