"""What ``ecp-checkpoint`` does: list, verify, compare and remove checkpoints."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ecp_scale.checkpoint.folder import (
    PARTIAL,
    RECORD,
    TAG,
    CheckpointRecord,
    checkpoints_folder,
    find_checkpoint,
    saved_folders,
)
from ecp_scale.checkpoint.retention import Retention, removable, remove
from ecp_scale.checkpoint.weights_file import PIECE
from ecp_scale.cluster.lock import Lock
from ecp_scale.errors import InputError
from ecp_scale.files import scaled_bytes
from ecp_scale.zero.saved_states import SavedStates
from ecp_scale.zero.state_files import damages

Say: TypeAlias = Callable[[str], None]
FIELDS = ("step", "tokens", "data_digest", "world_size", "tensor_parallel", "zero_stage", "precision", "versions")
SECTIONS = ("model", "attention", "optimizer", "data")
"""What two records are compared in."""


def describe(path: Path, say: Say) -> bool:
    """Say of every checkpoint what it is, oldest first; whether all are complete."""
    complete = True
    for folder in _folders(path):
        try:
            record = CheckpointRecord.read(folder)
        except InputError as error:
            say(f"{folder.name}  {error}")
            complete = False
            continue
        size = sum(file.size for file in record.files.values())
        saved = time.strftime("%F %T", time.localtime((folder / RECORD).stat().st_mtime))
        libraries = ", ".join(f"{name} {number}" for name, number in record.versions.items())
        say(
            f"{folder.name}  {record.tokens:,} tokens  {scaled_bytes(size)}  {record.world_size} ranks, "
            f"tensor {record.tensor_parallel}, ZeRO-{record.zero_stage}, {record.precision}  saved {saved}"
            f"{f'  {libraries}' if libraries else ''}"
        )
    for partial in sorted(checkpoints_folder(path).glob(f"step-*{PARTIAL}")):
        if TAG.fullmatch(partial.name.removesuffix(PARTIAL)):
            say(f"{partial.name}  being written, or cut short")
    return complete


def verify(path: Path, say: Say) -> bool:
    """Read every file of every checkpoint and compare its hash; whether all are as written."""
    right = True
    for folder in _folders(path):
        began = time.monotonic()
        try:
            record = CheckpointRecord.read(folder)
            found = damages(folder, record.files)
        except InputError as error:
            found = [str(error)]
        right &= not found
        if found:
            say("\n".join(found))
            continue
        size = sum(file.size for file in record.files.values())
        unhashed = sum(not file.xxh3 for file in record.files.values())
        older = f", {unhashed} without a hash, by an earlier version" if unhashed else ""
        seconds = time.monotonic() - began
        say(f"{folder}: {len(record.files)} files as written ({size:,} bytes in {seconds:.1f} s{older})")
    return right


def difference(first: Path, second: Path, say: Say) -> bool:
    """Say in what two checkpoints differ: what they are, then their weights in fp32; whether they do.

    Files that are not as they were written are named in place of that.
    """
    folders = [find_checkpoint(path) for path in (first, second)]
    records = [CheckpointRecord.read(folder) for folder in folders]
    damaged = [text for folder, record in zip(folders, records, strict=True) for text in damages(folder, record.files)]
    if damaged:
        say("\n".join(damaged))
        return True
    lines: list[str] = []
    for name in FIELDS:
        lines += _different(name, *(getattr(record, name) for record in records))
    for section in SECTIONS:
        sections: list[dict[str, Any]] = [getattr(record, section) for record in records]
        for name in sorted({*sections[0], *sections[1]}):
            lines += _different(f"{section}.{name}", *(values.get(name, "not there") for values in sections))
    saved = [SavedStates(f, r.files, r.partitions, r.tensor_parallel) for f, r in zip(folders, records, strict=True)]
    names = [list(states.partitions) for states in saved]
    lines += [f"only the {which} has {name}" for which, name in _only(*names)]
    shared = [name for name in names[0] if name in saved[1].partitions]
    differing = 0
    for name in shared:
        found = _weights(name, *saved)
        differing += found is not None
        lines += [] if found is None else [found]
    for line in lines:
        say(line)
    say(f"{differing} of {len(shared)} parameters differ")
    return bool(lines)


def prune(run: Path, keep_last: int, keep_every: int | None, dry_run: bool, say: Say) -> None:
    """Remove complete checkpoints of a run but for the newest ones, and those of every so many steps.

    Raises:
        InputError: if it has none, or a launch works in the run.
    """
    lock = Lock(run / ".lock")
    if not dry_run and removable(run):
        lock.take(f"run {run}")
    try:
        complete = removable(run)
        if not complete:
            raise InputError(f"{run}: expected a run with complete checkpoints/step-NNNNNNNN, found none")
        going = Retention(keep_last, keep_every).goes(complete)
        staying = [folder for folder in complete if folder not in going]
        damaged = [text for folder in staying for text in damages(folder, CheckpointRecord.read(folder).files)]
        if damaged and going:
            raise InputError("nothing is removed, as what would stay is damaged:\n" + "\n".join(damaged))
        for folder in going:
            if not dry_run:
                remove(folder)
            say(f"{'would remove' if dry_run else 'removed'} {folder}")
        say(f"{len(staying)} of {len(complete)} complete checkpoints stay")
    except OSError as error:
        raise InputError(f"{error.filename or run}: cannot be removed ({error.strerror or error})") from error
    finally:
        lock.release()


def _folders(path: Path) -> list[Path]:
    folders = [path] if (path / RECORD).exists() else saved_folders(path)
    if not folders:
        raise InputError(f"{path}: expected a checkpoint or a run with checkpoints/step-NNNNNNNN, found none")
    return folders


def _different(name: str, first: object, second: object) -> list[str]:
    return [] if first == second else [f"{name}: {first!r}, {second!r}"]


def _only(first: list[str], second: list[str]) -> list[tuple[str, str]]:
    return [("first", name) for name in first if name not in second] + [
        ("second", name) for name in second if name not in first
    ]


def _weights(name: str, first: SavedStates, second: SavedStates) -> str | None:
    """How the weights of a parameter differ, if they do."""
    shapes = [states.shape(name) for states in (first, second)]
    if shapes[0] != shapes[1]:
        return f"{name}: shape {shapes[0]}, {shapes[1]}"
    elements, largest, different, size = math.prod(shapes[0]), 0.0, 0, 0.0
    for start in range(0, elements, PIECE):
        one, other = (states.weight(name, start, min(start + PIECE, elements)) for states in (first, second))
        largest = max(largest, (one - other).abs().max().item())
        different += int((one.view(torch.int32) != other.view(torch.int32)).sum())  # by bits: equal where no number is
        size = max(size, one.abs().max().item())
    if not different:
        return None
    return f"{name}: {different:,} of {elements:,} elements, by up to {largest:.3g} where the largest is {size:.3g}"
