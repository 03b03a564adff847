"""One writer of a prefix or folder at a time, on all hosts that share it."""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

from ecp_scale.cluster.ranks import Process
from ecp_scale.errors import InputError

BEAT_SECONDS = 5.0
"""Between two heartbeats of a holder."""
PATIENCE_SECONDS = 20.0
"""How long a holder on another host may give none before it is taken for dead."""


class Lock:
    """A lock on a path, which other hosts see too, and which a dead holder loses.

    Two things say that it is held, since neither is enough alone. A lock of the file system: some are known to one host
    only (``localflock`` mounts of Lustre, BeeGFS), and some stay when a host dies (NFS). And a file beside it with the
    holder's host and process, whose time the holder moves on: where it stands still, or the process is gone from this
    host, the holder is dead.
    """

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(path, blocking=False)
        self._path = path.with_name(path.name + ".holder")
        self._mine = ""
        self._released = threading.Event()

    def take(self, what: str, waiting: Callable[[str], None] = lambda holder: None) -> str | None:
        """Hold the lock until ``release``.

        Args:
            what: is locked, for an error.
            waiting: called with the holder when this host has to watch whether it is alive, for up to
                ``PATIENCE_SECONDS``.

        Returns:
            Who has held it and died, as text; None where nobody has.

        Raises:
            InputError: naming host and process of who holds it, or the folder that cannot be written.
        """
        try:
            with suppress(filelock.Timeout):
                self._lock.acquire()
            holder = self._holder()
            if not holder and not self._lock.is_locked:
                time.sleep(0.5)  # between the lock and the file that tells of it
                holder = self._holder()
            if holder and self._is_alive(holder, waiting):
                self._lock.release()
                raise InputError(f"{what}: is being written by {_named(holder)}")
            if not holder and not self._lock.is_locked:
                raise InputError(f"{what}: is being written by another process")
            process = Process.this()
            since = time.strftime("%F %T %Z")
            self._mine = f"{process.pid}\n{process.host}\n{process.started}\n{since}\n{secrets.token_hex(8)}\n"
            self._path.write_text(self._mine)
        except OSError as error:
            raise InputError(f"{self._path.parent}: cannot be written ({error.strerror or error})") from error
        threading.Thread(target=self._beat, daemon=True, name="lock").start()
        return _named(holder) if holder else None

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if not self._mine:
            return
        self._released.set()
        with suppress(OSError):
            if self._holder() == self._mine:
                self._path.unlink()
        self._mine = ""
        self._lock.release()

    def _holder(self) -> str:
        """What the holder has written; nothing where there is none."""
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _is_alive(self, holder: str, waiting: Callable[[str], None]) -> bool:
        process = _process(holder)
        if process is None:  # of an earlier version, which wrote a sentence: the lock of the file system counts
            return not self._lock.is_locked
        if process.host == socket.gethostname() and process.is_seen():
            return True
        if process.host == socket.gethostname() and self._lock.is_locked:
            return False  # and no other container of this name either, which would hold the lock
        waiting(_named(holder))
        before = self._beats()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 5)
            if self._beats() != before:
                return self._holder() != ""
        return False

    def _beats(self) -> int | None:
        """Time of the last heartbeat. Trap: NFS looks for a newer one when a file is opened, not at stat."""
        try:
            with self._path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                if self._holder() == self._mine:
                    os.utime(self._path)


def _process(holder: str) -> Process | None:
    try:
        pid, host, started, _since, *_ = holder.splitlines()  # less where it is being written
        return Process(host, int(pid), float(started))
    except ValueError:
        return None


def _named(holder: str) -> str:
    """The holder as text."""
    process = _process(holder)
    if process is None:
        return holder.strip()
    return f"process {process.pid} on {process.host} since {holder.splitlines()[3]}"


@contextmanager
def only_writer(prefixes: Sequence[Path]) -> Iterator[None]:
    """Hold the locks of some prefixes, hidden files beside them.

    Raises:
        InputError: naming host and process of who holds one, or the folder that cannot be written.
    """
    with ExitStack() as stack:
        for prefix in prefixes:
            lock = Lock(prefix.with_name(f".{prefix.name}.lock"))
            lock.take(str(prefix))
            stack.callback(lock.release)
        yield
