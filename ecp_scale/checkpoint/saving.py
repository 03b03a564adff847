"""Save a run through DeepSpeed, in front of the training or behind it.

Every rank writes, hashes and syncs its own files; the first rank lists what the ranks have told it, and nothing that it
finds in the folder. The record comes last, when all have told.
"""

import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ecp_scale.checkpoint.folder import CheckpointRecord, begin, checkpoints_folder, publish, tag
from ecp_scale.checkpoint.identity import identity
from ecp_scale.checkpoint.mirror import Mirror
from ecp_scale.checkpoint.retention import Retention, remove_old
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.data.blend import Blend
from ecp_scale.parallel.digests import summed
from ecp_scale.parallel.groups import agreed, decided, gathered
from ecp_scale.parallel.partition import partitions
from ecp_scale.zero.checkpoint_engine import CheckpointFiles
from ecp_scale.zero.digests import held_digests
from ecp_scale.zero.engine import Engine
from ecp_scale.zero.state_files import FileRecord, copy_hashed, write_error

SIGHT_SECONDS = 10.0
"""How long a file of one host may take to be seen on another."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. Steps may differ in tokens where the sequence length or the batch has been changed."""

    step: int = 0
    tokens: int = 0
    data_digest: int = 0
    """Of all samples that were consumed, see ``ecp_scale.data.digest``."""


class SaveFailedError(RuntimeError):
    """A checkpoint could not be written; what was written of it is gone. Raised on all ranks."""


class Saves:
    """The saves of a run, at most one at a time; all ranks take part in every call but ``news``."""

    def __init__(self, engine: Engine, config: Config, blend: Blend, run: Path) -> None:
        """Args:
        engine: what is saved, made by ``build_engine``.
        config: of the run.
        blend: its data.
        run: its folder.
        """
        self._engine = engine
        self._config = config
        self._blend = blend
        self._run = run
        self._retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
        self._mirror = Mirror(Path(config.checkpoint.mirror), self._retention) if config.checkpoint.mirror else None
        self._partial: Path | None = None
        self._complaints: set[str] = set()
        self._skipped_steps = 0
        self._digests: dict[str, int] = {}
        self._probe_loss: float | None = None
        self.done = Progress()
        """How far the run was when the save began that is in progress, or the last one."""

    @property
    def _files(self) -> CheckpointFiles:
        files: CheckpointFiles = self._engine.checkpoint_engine
        return files

    @property
    def in_progress(self) -> bool:
        """Whether a save has begun and is not finished."""
        return self._partial is not None

    def news(self) -> tuple[int, int]:
        """Of this rank's part of the save in progress: 1 if it is written, and 1 if that has failed; else 0."""
        return int(not self._files.is_writing), int(self._files.has_failed)

    def begin(self, done: Progress, probe_loss: float | None = None) -> None:
        """Begin to save what is done; the states may change when this returns.

        Args:
            done: how far the run is.
            probe_loss: of the weights as they are.

        Raises:
            SaveFailedError: if its folder cannot be made.
        """
        assert not self.in_progress
        self.done, self._skipped_steps = done, self._engine.skipped_steps
        folder = checkpoints_folder(self._run) / tag(done.step)
        partial = decided(lambda: _attempt(lambda: begin(folder), folder))
        if isinstance(partial, str):
            raise SaveFailedError(partial)
        self._partial = partial
        self._engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
        self._digests, self._probe_loss = held_digests(self._engine), probe_loss

    def finish(self) -> Path:
        """Wait until all ranks have written, and make it a checkpoint.

        Returns:
            Its folder.

        Raises:
            SaveFailedError: naming the files that could not be written.
        """
        partial = self._partial
        assert partial is not None
        self._partial = None
        written = agreed(lambda: self._written(partial), takes_long=True)
        reports = gathered((written, socket.gethostname(), self._digests))
        failure = decided(lambda: _attempt(lambda: self._publish(partial, reports), partial))
        if failure is not None:
            raise SaveFailedError(failure)
        return partial.with_name(tag(self.done.step))

    def _written(self, partial: Path) -> dict[str, FileRecord] | str:
        """What this rank has written; as text, why not, whatever it was: the other ranks wait for the answer."""
        try:
            return self._files.written()
        except OSError as error:
            return write_error(partial, error)
        except Exception as error:
            return f"{partial}: {type(error).__name__}: {error}"

    def settle(self, patience_seconds: float) -> bool:
        """Wait until the mirror has all that it is to have; whether it does, as the first rank knows.

        One that gets no file for ``patience_seconds`` is not waited for, and what it lacks it does not get any more.
        """
        return agreed(lambda: self._settle(patience_seconds), takes_long=True)

    def _settle(self, patience_seconds: float) -> bool:
        if self._mirror is None or dist.get_rank() != 0:
            return True
        if not self._mirror.finish(patience_seconds):
            say(f"mirror      has got no file for {patience_seconds:.0f} s, and is not waited for")
            self._mirror.abandon()
            return False
        self._remove_old(checkpoints_folder(self._run) / tag(self.done.step))
        return True

    def in_mirror(self, action: Callable[[], None]) -> None:
        """Have something done in the mirror before the next copy."""
        if self._mirror is not None and dist.get_rank() == 0:
            self._mirror.before_next(action)

    def catch_up(self, newest: Path | None) -> None:
        """Have the mirror copy the checkpoint that the run goes on from, which a stopped run has left it without."""
        is_own = newest is not None and newest.parent == checkpoints_folder(self._run)
        if self._mirror is not None and newest is not None and is_own and dist.get_rank() == 0:
            self._mirror.copy(newest)

    def not_mirrored(self) -> Path | None:
        """The newest checkpoint that the mirror, if there is one, does not have yet."""
        return self._mirror.waiting if self._mirror is not None else None

    def _remove_old(self, newest: Path) -> None:
        """Let go of older checkpoints; what cannot be removed is said once."""
        for error in remove_old(newest, self._retention, self._mirror.current if self._mirror else None):
            text = f"{error.filename}: {error.strerror}"
            if text not in self._complaints:
                say(f"older checkpoints cannot be removed: {text}")
            self._complaints.add(text)

    def _publish(
        self, partial: Path, reports: list[tuple[dict[str, FileRecord] | str, str, dict[str, int]]]
    ) -> str | None:
        """Write the record of what all ranks have written and publish the folder; else say why not, and remove it."""
        failures: list[str] = []
        files: dict[str, FileRecord] = {}
        deadline = time.monotonic() + SIGHT_SECONDS
        for rank, (written, host, _) in enumerate(reports):
            if isinstance(written, str):
                failures.append(f"rank {rank} on host {host}: {written}")
                continue
            files |= written
            unseen = _unseen(partial, written, deadline)
            if unseen is not None:
                failures.append(f"rank {rank} on host {host} has written {unseen}, which the first rank does not see")
        try:
            if failures:
                return "; ".join(failures)
            record = self._record(partial, files, [digests for _, _, digests in reports])
            lacking = record.lacking()
            if lacking is not None:
                return f"{partial}: the record {lacking}"
            record.write(partial)
            publish(partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        newest = partial.with_name(tag(self.done.step))
        if self._mirror is not None:
            self._mirror.copy(newest)
        self._remove_old(newest)
        return None

    def _record(self, partial: Path, files: dict[str, FileRecord], digests: list[dict[str, int]]) -> CheckpointRecord:
        tokenizer = self._blend.corpora[0].tokenizer
        if tokenizer.path is not None:
            files[tokenizer.path.name] = copy_hashed(tokenizer.path, partial / tokenizer.path.name)
        return CheckpointRecord(
            step=self.done.step,
            tokens=self.done.tokens,
            tokenizer=self._blend.corpora[0].manifest.tokenizer,
            tokenizer_file=tokenizer.path.name if tokenizer.path else "",
            partitions=(stored := partitions(self._engine.module)),
            digests=summed(list(stored), digests),
            probe_loss=self._probe_loss,
            files=dict(sorted(files.items())),
            data_digest=f"{self.done.data_digest:016x}",
            skipped_steps=self._skipped_steps,
            run_tokens=self._config.run_tokens(self.done.step, self.done.tokens),
            versions={name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
            **layout_of(self._engine, self._config),
            **identity(self._config, self._blend, self.done.tokens),
        )


def _unseen(folder: Path, names: Iterable[str], deadline: float) -> str | None:
    """A file of another host that this one does not see, also after the while that a file system may take for it."""
    for name in sorted(names):
        while not (folder / name).is_file():
            if time.monotonic() > deadline:
                return name
            time.sleep(0.1)
    return None


def _attempt(action: Callable[[], Any], path: Path) -> Any:
    """What ``action`` returns; as text, why the disk refused it."""
    try:
        return action()
    except OSError as error:
        return write_error(path, error)


def layout_of(engine: Engine, config: Config) -> dict[str, Any]:
    """What decides the form of DeepSpeed's files."""
    return {
        "world_size": dist.get_world_size(),
        "tensor_parallel": config.parallel.tensor,
        "zero_stage": engine.zero_optimization_stage(),
        "precision": config.training.precision,
    }
