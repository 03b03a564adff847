"""One writer of a prefix or folder at a time, on all hosts that share it."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock

from ecp_scale.errors import InputError


class Lock:
    """A file that one process holds; it stays, and the system frees it when the process dies.

    Who holds it is in a file beside it. Where the file system has no locks (some mounts of Lustre), filelock makes and
    removes a file instead, and knows a dead holder on the same host by its process.
    """

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(path, blocking=False)
        self._path = path.with_name(path.name + ".holder")

    def take(self, what: str) -> str | None:
        """Hold the lock until ``release``.

        Args:
            what: is locked, for an error.

        Returns:
            Who has held it and died, as text; None where nobody has.

        Raises:
            InputError: naming host and process of who holds it, or the folder that cannot be written.
        """
        try:
            self._lock.acquire()
            gone = self._path.read_text().strip() if self._path.exists() else ""
            self._path.write_text(
                f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T %Z')}\n"
            )
        except filelock.Timeout:
            raise InputError(f"{what}: is being written by {self._holder()}") from None
        except OSError as error:
            raise InputError(f"{self._path.parent}: cannot be written ({error.strerror or error})") from error
        return gone or None

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._lock.is_locked:
            self._path.unlink(missing_ok=True)
            self._lock.release()

    def _holder(self) -> str:
        try:
            return self._path.read_text().strip() or "another process"
        except OSError:
            return "another process"


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
