"""A second place for checkpoints, which the first rank copies them to behind the training."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ecp_scale.checkpoint.folder import (
    RECORD,
    CheckpointRecord,
    begin,
    check_writable,
    checkpoints_folder,
    publish,
    saved_folders,
)
from ecp_scale.checkpoint.retention import Retention, remove_old
from ecp_scale.cluster.lock import Lock
from ecp_scale.console import say
from ecp_scale.errors import InputError
from ecp_scale.files import write_text
from ecp_scale.zero.state_files import copy_hashed

OWNER = "mirror-of"
"""File of a mirror that names the run folder whose checkpoints it has."""


@contextmanager
def held_mirror(folder: Path, run: Path) -> Iterator[None]:
    """Make the folder of a mirror, and hold it for one run.

    Raises:
        InputError: if it cannot be written, is the run folder, or is the mirror of another run or in use.
    """
    check_apart(folder, run)
    lock = Lock(folder / ".lock")
    try:
        _take(folder, str(run.resolve()), lock)
        yield
    finally:
        lock.release()


def check_apart(folder: Path, run: Path) -> None:
    """Refuse a mirror that is lost with its run folder.

    Raises:
        InputError: if it is the run folder, or in it.
    """
    if folder.resolve().is_relative_to(run.resolve()):
        raise InputError(f"checkpoint.mirror {folder} is the run folder itself or in it, expected another place")


def check_owner(folder: Path, run: str) -> None:
    """Refuse the mirror of another run.

    Raises:
        InputError: naming that run, or what cannot be read.
    """
    owner = folder / OWNER
    try:
        found = owner.read_text().strip() if owner.exists() else "a run that it does not name"
        is_used = owner.exists() or bool(saved_folders(folder))
    except OSError as error:
        raise InputError(f"checkpoint.mirror {error.filename or folder}: {error.strerror or error}") from error
    if is_used and found != run:
        raise InputError(
            f"checkpoint.mirror {folder} has the checkpoints of {found}, expected those of {run}; give every run a "
            f"mirror of its own, or write {run} to {owner} if the run has moved"
        )


def _take(folder: Path, run: str, lock: Lock) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder, ".probe")
        lock.take(f"checkpoint.mirror {folder}")
        check_owner(folder, run)
        write_text(folder / OWNER, f"{run}\n")
    except OSError as error:
        raise InputError(f"checkpoint.mirror {error.filename or folder}: {error.strerror or error}") from error


class Mirror:
    """Copies one checkpoint at a time; of those that come meanwhile, the newest is next.

    What goes wrong is said once, until a copy succeeds again: a run does not end because of its mirror.
    """

    def __init__(self, folder: Path, retention: Retention) -> None:
        """Args:
        folder: that gets checkpoints/step-NNNNNNNN, as a run has them.
        retention: which of them stay.
        """
        self._folder = folder
        self._retention = retention
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._current: Path | None = None
        self._next: Path | None = None
        self._first: Callable[[], None] | None = None
        self._abandoned = 0
        self._files = 0
        self._has_complained = False

    @property
    def current(self) -> Path | None:
        """The checkpoint that is being copied, which must stay meanwhile."""
        return self._current

    @property
    def waiting(self) -> Path | None:
        """The newest checkpoint that is not copied yet."""
        return self._next or self._current

    def copy(self, checkpoint: Path) -> None:
        """Have a complete checkpoint copied."""
        with self._lock:
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def abandon(self) -> None:
        """Have nothing copied of what has been asked for; a copy that hangs is not published when it goes on."""
        with self._lock:
            self._next = None
            self._abandoned += 1

    def before_next(self, action: Callable[[], None]) -> None:
        """Have something done in the mirror before the next copy."""
        with self._lock:
            self._first = action

    def finish(self, patience_seconds: float | None = None) -> bool:
        """Wait until all is copied; whether it is. No longer than ``patience_seconds`` without one more file there."""
        thread = self._thread
        while thread is not None and thread.is_alive():
            before = self._files
            thread.join(patience_seconds)
            if self._files == before and thread.is_alive():
                return False
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                self._current, self._next = self._next, None
                if self._current is None:
                    self._thread = None
                    return
                (first, self._first), abandoned = (self._first, None), self._abandoned
            try:
                if not (self._folder / OWNER).is_file():  # as where its disk is not there any more
                    raise InputError(f"{self._folder} is gone: {OWNER} is missing")
                if first is not None:
                    first()
                remove_old(checkpoints_folder(self._folder) / self._current.name, Retention())
                copy_checkpoint(self._current, self._folder, partial(self._is_wanted, abandoned))
                if not self._is_wanted(abandoned):
                    continue
                left = remove_old(checkpoints_folder(self._folder) / self._current.name, self._retention)
                if left:
                    raise left[0]
                self._has_complained = False
            except Exception as error:  # whatever it is, the next one is tried
                if not self._has_complained:
                    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
                    say(f"mirror      {self._current.name} is not copied: {text}; the run goes on")
                self._has_complained = True

    def _is_wanted(self, abandoned: int) -> bool:
        """Whether nothing has been abandoned since; asked after every file."""
        self._files += 1
        return abandoned == self._abandoned


def copy_checkpoint(checkpoint: Path, folder: Path, is_wanted: Callable[[], bool] = lambda: True) -> Path:
    """Copy a complete checkpoint into another run folder, whole or not at all; what is read is compared with its hash.

    ``is_wanted``: asked after every file; where it says no, nothing is left of the copy.

    Returns:
        Its folder there; where the same checkpoint stands already, it is left as it is.

    Raises:
        InputError: if a file is not as it was written.
        OSError: naming what cannot be read or written, or another checkpoint of that step.
    """
    record = CheckpointRecord.read(checkpoint)
    target = checkpoints_folder(folder) / checkpoint.name
    with suppress(InputError):
        if CheckpointRecord.read(target) == record:
            return target
    unfinished = begin(target)
    try:
        for name, expected in record.files.items():
            found = copy_hashed(checkpoint / name, unfinished / name)
            if expected.xxh3 and found != expected:
                raise InputError(f"{checkpoint / name} is damaged: it is not what was written, by its hash")
            if not is_wanted():
                return target
        copy_hashed(checkpoint / RECORD, unfinished / RECORD)
        if is_wanted():
            publish(unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # a disk that was full must not stay so
    return target
