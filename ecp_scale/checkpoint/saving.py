"""Save a run through DeepSpeed, and find the checkpoint that it goes on from.

Every rank writes, hashes and syncs its own files; the first rank lists what the ranks have told it, and nothing that it
finds in the folder. The first rank also chooses the checkpoint of a resume: a shared file system may show another host
an older state.
"""

import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ecp_scale.checkpoint.folder import (
    RECORD,
    CheckpointRecord,
    begin,
    check_writable,
    checkpoints_folder,
    newest_complete,
    publish,
    remove_old,
    saved_folders,
    tag,
)
from ecp_scale.checkpoint.identity import check_continues, identity
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.data.blend import Blend
from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import agreed, decided
from ecp_scale.parallel.partition import partitions
from ecp_scale.zero.checkpoint_engine import CheckpointFiles
from ecp_scale.zero.engine import Engine
from ecp_scale.zero.filling import fill, optimizer_order, share_weights
from ecp_scale.zero.saved_states import SavedStates
from ecp_scale.zero.state_files import FileRecord, copy_hashed, damages, write_error


@dataclass(frozen=True)
class Progress:
    """How far a run is. Steps may differ in tokens where the sequence length or the batch has been changed."""

    step: int = 0
    tokens: int = 0
    data_digest: int = 0
    """Of all samples that were consumed, see ``ecp_scale.data.digest``."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: after a checkpoint, or afresh; and the newer checkpoints that are passed by, with reasons."""

    folder: Path | None = None
    record: CheckpointRecord | None = None
    passed_by: tuple[str, ...] = ()

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        if self.record is None:
            return Progress()
        return Progress(self.record.step, self.record.tokens, int(self.record.data_digest, 16))


class SaveFailedError(RuntimeError):
    """A checkpoint could not be written; what was written of it is gone. Raised on all ranks."""


def save(engine: Engine, config: Config, blend: Blend, run: Path, done: Progress, run_tokens: int = 0) -> Path:
    """Write the checkpoint of what is done; all ranks take part.

    Args:
        engine: what to save, made by ``build_engine``.
        config: of the run.
        blend: its data.
        run: its folder.
        done: how far it is.
        run_tokens: tokens of the whole run.

    Returns:
        The folder of the checkpoint.

    Raises:
        SaveFailedError: naming the files that could not be written.
    """
    folder = checkpoints_folder(run) / tag(done.step)
    partial = decided(lambda: _attempt(lambda: begin(folder), folder))
    if isinstance(partial, str):
        raise SaveFailedError(partial)
    files: CheckpointFiles = engine.checkpoint_engine
    engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (files.written, files.failure, socket.gethostname()))

    def finish() -> str | None:
        return _attempt(lambda: _finish(engine, config, blend, partial, done, run_tokens, reports), partial)

    failure = decided(finish)
    if failure is not None:
        raise SaveFailedError(failure)
    return folder


def _attempt(action: Any, path: Path) -> Any:
    """What ``action`` returns; as text, why the disk refused it."""
    try:
        return action()
    except OSError as error:
        return write_error(path, error)


def _finish(
    engine: Engine,
    config: Config,
    blend: Blend,
    partial: Path,
    done: Progress,
    run_tokens: int,
    reports: list[tuple[dict[str, FileRecord], str | None, str]],
) -> str | None:
    """Write the record of what all ranks have written and publish the folder; else say why not, and remove it."""
    failures = [
        f"rank {rank} on host {host}: {failure}"
        for rank, (_, failure, host) in enumerate(reports)
        if failure is not None
    ]
    files = {name: record for written, _, _ in reports for name, record in written.items()}
    for rank, (written, _, host) in enumerate(reports):
        unseen = sorted(name for name in written if not (partial / name).is_file())
        if unseen:
            failures.append(f"rank {rank} on host {host} has written {unseen[0]}, which the first rank does not see")
    tokenizer = blend.corpora[0].tokenizer
    try:
        if failures:
            return "; ".join(failures)
        if tokenizer.path is not None:
            files[tokenizer.path.name] = copy_hashed(tokenizer.path, partial / tokenizer.path.name)
        record = CheckpointRecord(
            step=done.step,
            tokens=done.tokens,
            tokenizer=blend.corpora[0].manifest.tokenizer,
            tokenizer_file=tokenizer.path.name if tokenizer.path else "",
            partitions=partitions(engine.module),
            files=dict(sorted(files.items())),
            data_digest=f"{done.data_digest:016x}",
            skipped_steps=engine.skipped_steps,
            run_tokens=run_tokens,
            **_layout(engine, config),
            **identity(config, blend, done.tokens),
        )
        lacking = record.lacking()
        if lacking is not None:
            return f"{partial}: the record {lacking}"
        record.write(partial)
        publish(partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        remove_old(partial.with_name(tag(done.step)), config.checkpoint.keep)
    except OSError as error:  # The new checkpoint stands.
        say(f"older checkpoints cannot be removed: {error.filename}: {error.strerror}")
    return None


def find_start(run: Path, resuming: bool) -> Start:
    """Where a run begins that finds ``run`` as it is; for one rank to ask.

    Raises:
        InputError: if there is a checkpoint, and the run is not to go on from it.
    """
    folder, passed = newest_complete(run)
    if folder is None:
        # A folder without a record is of a save that an earlier version was cut short in.
        if any((path / RECORD).exists() for path in saved_folders(run)):
            # Not the first save that was cut short: work that something else has damaged, or that cannot be seen now.
            raise InputError(
                "none of the run's checkpoints can be read; restore them, move them away to start over, or choose "
                "another folder:\n" + "\n".join(f"  - {text}" for text in passed)
            )
        return Start(passed_by=tuple(passed))
    if not resuming:
        raise InputError(f"training.output_dir {run} holds checkpoints; pass --resume auto or choose another folder")
    return Start(folder, CheckpointRecord.read(folder), tuple(passed))


def check_sight(run: Path, start: Start) -> None:
    """Refuse a rank that cannot write checkpoints, or sees a newer one than the first rank, which chose ``start``.

    Raises:
        InputError: naming the folder.
        OSError: naming what cannot be written.
    """
    check_writable(run, f".probe-{dist.get_rank()}")
    known = "\n".join(start.passed_by)
    for folder in saved_folders(run):
        newer = start.folder is None or folder.name > start.folder.name
        if newer and folder.name not in known:
            raise InputError(
                f"{folder} is seen on host {socket.gethostname()}, but not by the first rank, which would go on from "
                f"{start.folder or 'nothing'}; start again when the file system shows it on all hosts"
            )


def check_start(start: Start, config: Config, blend: Blend) -> None:
    """Refuse to go on from the checkpoint of another run, see ``check_continues``; for one rank to ask.

    Raises:
        InputError: listing what differs.
    """
    if start.record is not None:
        check_continues(start.record, start.folder, identity(config, blend, start.record.tokens))


def load(engine: Engine, config: Config, start: Start) -> None:
    """Fill a new engine with what a checkpoint of any layout holds; all ranks take part.

    Every file is read from front to end first and compared with its hash: in the same layout by the ranks that go on to
    load it, whose host may have another copy in its cache; else each by one rank.

    Raises:
        InputError: on all ranks, if a file is damaged.
    """
    folder, record = start.folder, start.record
    if folder is None or record is None:
        return
    layout = _layout(engine, config)
    same = layout == {key: getattr(record, key) for key in layout}
    agreed(lambda: _check_files(folder, record, _own_files(engine, record) if same else _share(record)), True)
    if same:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        order = optimizer_order(engine)
        agreed(lambda: fill(engine, SavedStates(folder, record.partitions, record.tensor_parallel, order)), True)
        share_weights(engine)
        engine.global_steps, engine.skipped_steps = record.step, record.skipped_steps


def _own_files(engine: Engine, record: CheckpointRecord) -> list[str]:
    """Names of the files that DeepSpeed loads on this rank; the first one looks at those that no rank loads, too."""
    names = [engine._get_ckpt_name("", "")]
    if engine.zero_optimization():
        names.append(engine._get_zero_ckpt_name("", ""))
    missing = [name for name in names if name not in record.files]
    if missing:
        raise InputError(f"the checkpoint lists no file {missing[0]} of rank {dist.get_rank()}")
    others = [name for name in record.files if not name.endswith("_states.pt")] if dist.get_rank() == 0 else []
    return names + others


def _share(record: CheckpointRecord) -> list[str]:
    """A part of the files, so that those of all ranks make up the whole."""
    return sorted(record.files)[dist.get_rank() :: dist.get_world_size()]


def _check_files(folder: Path, record: CheckpointRecord, names: list[str]) -> None:
    """Compare some of the files with their hashes."""
    found = damages(folder, {name: record.files[name] for name in names})
    if found:
        raise InputError("\n".join(found))


def _layout(engine: Engine, config: Config) -> dict[str, Any]:
    """What decides the form of DeepSpeed's files."""
    return {
        "world_size": dist.get_world_size(),
        "tensor_parallel": config.parallel.tensor,
        "zero_stage": engine.zero_optimization_stage(),
        "precision": config.training.precision,
    }
