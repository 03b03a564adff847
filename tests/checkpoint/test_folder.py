"""What counts as a complete checkpoint."""

from pathlib import Path

import pytest

from ecp_scale.checkpoint.files import FileRecord
from ecp_scale.checkpoint.folder import (
    FORMAT_VERSION,
    CheckpointRecord,
    checkpoints_folder,
    complete_checkpoints,
    find_checkpoint,
    remove_old,
    tag,
)
from ecp_scale.data.manifest import TokenizerRecord
from ecp_scale.errors import InputError
from ecp_scale.models.sharding import Layout


def write_checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    """A checkpoint with one small file."""
    folder = checkpoints_folder(run) / tag(step)
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"12345")
    record = CheckpointRecord(
        step=step,
        tokens=step * 10,
        ledger="0" * 16,
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
        layouts={"weight": Layout(0, 7)},
        files={"mp_rank_00_model_states.pt": FileRecord(5)},
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
    (folder / "checkpoint.json").write_text(f'{{"format_version": {FORMAT_VERSION}}}')
    with pytest.raises(InputError, match="not the record of a checkpoint"):
        CheckpointRecord.read(folder)


def test_old_checkpoints_go_and_newer_incomplete_ones_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, complete=step != 1)
    write_checkpoint(tmp_path, 9, complete=False)
    remove_old(tmp_path, keep=2)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    left = sorted(folder.name for folder in checkpoints_folder(tmp_path).iterdir())
    assert left == ["step-00000003", "step-00000004", "step-00000009"]
