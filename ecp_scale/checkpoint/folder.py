"""The folder of one checkpoint, and what makes it complete.

DeepSpeed writes its files into RUN/checkpoints/step-NNNNNNNN.partial. When all are on disk, the record
``checkpoint.json`` lists them with sizes and hashes, and the folder loses the ``.partial``: a folder without a record,
or with a file missing or short, is no checkpoint. Nothing else is trusted, in particular no ``latest`` file, which a
kill can leave pointing at half a checkpoint. Other names in RUN/checkpoints are the user's, and so are links: they are
left alone.
"""

import dataclasses
import errno
import itertools
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ecp_scale.config.renames import renamed_fields
from ecp_scale.data.manifest import TokenizerRecord
from ecp_scale.errors import InputError
from ecp_scale.files import sync_folder, write_text
from ecp_scale.parallel.partition import Partition
from ecp_scale.zero.state_files import FileRecord

RECORD = "checkpoint.json"
FORMAT_VERSION = 8
READABLE = (3, 4, 5, 6, 7, 8)
"""Version 3 does not say which tokens the corpora hold, only how many; 3 and 4 have no hashes of files; up to 5 some
fields have other names (``ecp_scale.config.renames``); up to 6 no versions of libraries are written; up to 7 no digests
of the weights, and no loss of the probe."""
HASHED = 5
"""Format version from which on files and the record itself have hashes."""
RENAMED = 6
"""Format version from which on fields have their present names."""
TAG = re.compile(r"step-(\d{8})")
PARTIAL = ".partial"


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint is: where the run stood, how it was laid out, and the files that hold it."""

    step: int
    tokens: int
    data_digest: str
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
    partitions: dict[str, Partition]
    files: dict[str, FileRecord]
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The section of the config; empty where an earlier version wrote it."""
    run_tokens: int = 0
    """Tokens of the whole run, as it was planned then."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that wrote it; empty where an earlier version did."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of every parameter in fp32 (``ecp_scale.parallel.digests``); empty where an earlier version wrote it."""
    probe_loss: float | None = None
    """What the probe's tokens cost (``ecp_scale.models.probe``), in nats per token, in the precision of the run."""

    def write(self, folder: Path) -> None:
        """Declare the folder complete; every file in it must have reached the disk."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        content["files"] = {name: record._asdict() for name, record in self.files.items()}
        write_text(folder / RECORD, json.dumps(signed(content), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CheckpointRecord":
        """Read a record, and look whether the files are there.

        Raises:
            InputError: naming what is missing or damaged.
        """
        path = folder / RECORD
        try:
            record = cls._parsed(json.loads(path.read_text()), path)
        except OSError as error:
            raise InputError(f"{folder}: not a complete checkpoint, {RECORD} is missing ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not the record of a checkpoint ({type(error).__name__}: {error})") from error
        named = TAG.fullmatch(folder.name)
        if named is not None and int(named[1]) != record.step:
            raise InputError(f"{folder}: holds step {record.step}, expected {int(named[1])} by its name")
        for name, (size, _) in record.files.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, expected {size}"
                raise InputError(f"{folder}: not a complete checkpoint, {name} {what}")
        return record

    @classmethod
    def _parsed(cls, content: dict[str, Any], path: Path) -> "CheckpointRecord":
        version = content.pop("format_version")
        if version not in READABLE:
            raise InputError(f"{path}: format version {version}, expected one of {READABLE}")
        found = content.pop("xxh3", "none")
        if version >= HASHED and found != signed({"format_version": version, **content})["xxh3"]:
            raise InputError(f"{path}: is damaged: it is not what was written, by its hash")
        content = with_present_names(content, version)
        content["tokenizer"] = TokenizerRecord(**content["tokenizer"])
        content["partitions"] = {name: Partition(**partition) for name, partition in content["partitions"].items()}
        content["files"] = {
            name: FileRecord(**entry) if isinstance(entry, dict) else FileRecord(entry)
            for name, entry in content["files"].items()
        }
        record = cls(**content)
        unhashed = [name for name, file in record.files.items() if not file.xxh3]
        if version >= HASHED and unhashed:
            raise InputError(f"{path}: has no hash of {', '.join(unhashed[:3])}")
        for name in [*record.files, *filter(None, [record.tokenizer_file, record.tokenizer.file])]:
            if Path(name).name != name or name in ("", ".."):
                raise InputError(f"{path}: names the file {name!r}, expected a plain name in its own folder")
        lacking = record.lacking()
        if lacking:
            raise InputError(f"{path}: {lacking}")
        return record

    def lacking(self) -> str | None:
        """What the record should list by its layout and does not: every rank writes a file, or one of each share."""
        shares = self.world_size if self.zero_stage == 3 else self.tensor_parallel
        partitions = self.world_size if self.zero_stage else 0
        for ending, expected in (("_model_states.pt", shares), ("_optim_states.pt", partitions)):
            found = sum(name.endswith(ending) for name in self.files)
            if found != expected:
                return (
                    f"lists {found} files *{ending}, expected {expected} of {self.world_size} ranks, "
                    f"ZeRO-{self.zero_stage}, tensor parallel {self.tensor_parallel}"
                )
        return None


def with_present_names(content: dict[str, Any], version: int) -> dict[str, Any]:
    """A record of an earlier version under the names of this one."""
    if version >= RENAMED:
        return content
    names = {"ledger": "data_digest", "layouts": "partitions"}
    renamed = {names.get(name, name): value for name, value in content.items()}
    sections = ("model", "attention", "optimizer")
    return renamed | {name: renamed_fields(name, renamed[name]) for name in sections if name in renamed}


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a record with its hash."""
    rest = {key: value for key, value in content.items() if key != "xxh3"}
    return {**rest, "xxh3": xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def check_writable(run: Path, name: str) -> None:
    """Make the folder of checkpoints if it is missing, and write a file ``name`` to it that goes at once.

    Raises:
        OSError: naming what cannot be made or written.
    """
    folder = checkpoints_folder(run)
    folder.mkdir(exist_ok=True)
    probe = folder / name
    probe.write_bytes(b"")
    probe.unlink()


def tag(step: int) -> str:
    """Name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def saved_folders(run: Path) -> list[Path]:
    """Folders that look like checkpoints by their names, oldest first."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if TAG.fullmatch(path.name) and path.is_dir())


def newest_complete(
    run: Path, objection: Callable[[CheckpointRecord], str | None] = lambda record: None
) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint without ``objection``, and what of newer ones is passed by, with the reason."""
    found = None
    passed: dict[str, str] = {}
    for folder in reversed(saved_folders(run)):
        try:
            reason = objection(CheckpointRecord.read(folder))
        except InputError as error:
            passed[folder.name] = str(error)
            continue
        if reason is None:
            found = folder
            break
        passed[folder.name] = f"{folder}: {reason}"
    for path in checkpoints_folder(run).glob(f"step-*{PARTIAL}"):
        if TAG.fullmatch(path.name.removesuffix(PARTIAL)) and (found is None or path.name > found.name):
            passed[path.name] = f"{path}: its save was cut short"
    return found, [passed[name] for name in sorted(passed)]


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for folder in saved_folders(run):
        try:
            CheckpointRecord.read(folder)
        except InputError:
            continue
        found.append(folder)
    return found


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint itself, whatever its name, or the newest complete one of a run.

    Raises:
        InputError: if there is no complete checkpoint.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise InputError(f"checkpoint {path}: no such folder")
    if (path / RECORD).exists() or TAG.fullmatch(path.name):
        CheckpointRecord.read(path)
        return path
    found, passed = newest_complete(path)
    if found is None:
        seen = f"only incomplete ones: {'; '.join(passed)}" if passed else "nothing like checkpoints/step-NNNNNNNN"
        raise InputError(f"run {path}: expected a complete checkpoint, found {seen}")
    return found


def begin(folder: Path) -> Path:
    """Make the folder that a checkpoint is written into, empty; what a cut save of the same step left goes.

    A folder that has the name of the checkpoint, and is incomplete, is renamed.

    Raises:
        OSError: if it cannot be made, or the checkpoint is there already: nothing is written over one.
    """
    if folder.exists():
        with suppress(InputError):
            CheckpointRecord.read(folder)
            raise FileExistsError(errno.EEXIST, "is a checkpoint already, and nothing is written over one", str(folder))
        set_aside(folder, "incomplete")
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def set_aside(folder: Path, why: str) -> None:
    """Rename a checkpoint, or what has the name of one, so that it is none of the run's any more.

    Args:
        folder: of it.
        why: goes into the new name.

    Raises:
        OSError: if it cannot be renamed.
    """
    names = (Path(f"{folder}.{why}-{number}") for number in itertools.count(1))
    folder.rename(next(name for name in names if not name.exists()))


def publish(partial: Path) -> None:
    """Give a folder that holds its record the name of a checkpoint.

    Raises:
        OSError: if a folder of that name is there, which only an earlier version leaves, and is not empty.
    """
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    sync_folder(partial)
    partial.replace(folder)
    sync_folder(folder.parent)
