"""The folder of one checkpoint, and what makes it complete.

DeepSpeed writes its files into RUN/checkpoints/step-NNNNNNNN. The record ``checkpoint.json``, written last, lists
them with their sizes: a folder without it, or with a file missing or short, is no checkpoint. Nothing else is
trusted, in particular no ``latest`` file, which a kill can leave pointing at half a checkpoint.
"""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecp_scale.data.files import sync_folder, write_text
from ecp_scale.data.manifest import TokenizerRecord
from ecp_scale.errors import InputError
from ecp_scale.models.sharding import Layout

RECORD = "checkpoint.json"
FORMAT_VERSION = 4
READABLE = (3, 4)
"""Version 3 does not say which tokens the corpora hold, only how many."""
TAG = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint is: where the run stood, how it was laid out, and the files that hold it."""

    step: int
    tokens: int
    ledger: str
    skipped_steps: int
    world_size: int
    tensor_parallel: int
    zero_stage: int
    precision: str
    model: dict[str, Any]
    attention: dict[str, Any]
    data: dict[str, Any]
    tokenizer: TokenizerRecord
    tokenizer_file: str
    layouts: dict[str, Layout]
    files: dict[str, int]

    def write(self, folder: Path) -> None:
        """Declare the folder complete, after every file in it has reached the disk."""
        for name in self.files:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_text(folder / RECORD, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CheckpointRecord":
        """Read and check a checkpoint.

        Raises:
            InputError: naming what is missing or damaged.
        """
        path = folder / RECORD
        try:
            content = json.loads(path.read_text())
            version = content.pop("format_version")
            if version not in READABLE:
                raise InputError(f"{path}: format version {version}, expected one of {READABLE}")
            content["tokenizer"] = TokenizerRecord(**content["tokenizer"])
            content["layouts"] = {name: Layout(**layout) for name, layout in content["layouts"].items()}
            record = cls(**content)
        except OSError as error:
            raise InputError(f"{folder}: not a complete checkpoint, {RECORD} is missing ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not the record of a checkpoint ({type(error).__name__}: {error})") from error
        for name, size in record.files.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, expected {size}"
                raise InputError(f"{folder}: not a complete checkpoint, {name} {what}")
        return record


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def tag(step: int) -> str:
    """Name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for folder in sorted(checkpoints_folder(run).glob("step-*")):
        if TAG.fullmatch(folder.name) and folder.is_dir():
            try:
                CheckpointRecord.read(folder)
            except InputError:
                continue
            found.append(folder)
    return found


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint itself, or the newest complete one of a run.

    Raises:
        InputError: if there is no complete checkpoint.
    """
    if not path.is_dir():
        raise InputError(f"checkpoint {path}: no such folder")
    if TAG.fullmatch(path.name):
        CheckpointRecord.read(path)
        return path
    found = complete_checkpoints(path)
    if not found:
        begun = [folder.name for folder in sorted(checkpoints_folder(path).glob("step-*"))]
        seen = f"only incomplete ones: {', '.join(begun)}" if begun else "nothing like checkpoints/step-NNNNNNNN"
        raise InputError(f"run {path}: expected a complete checkpoint, found {seen}")
    return found[-1]


def remove_old(run: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and incomplete ones older than the newest."""
    if keep is None:
        return
    complete = complete_checkpoints(run)
    if not complete:
        return
    kept = {folder.name for folder in complete[-keep:]}
    for folder in checkpoints_folder(run).glob("step-*"):
        if folder.name not in kept and folder.name < complete[-1].name:
            # The record goes first: what a kill leaves behind is then incomplete, not wrong.
            (folder / RECORD).unlink(missing_ok=True)
            shutil.rmtree(folder)
