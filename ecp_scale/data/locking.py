"""One writer of a prefix at a time, on all hosts that share the folder."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock

from ecp_scale.errors import InputError


@contextmanager
def only_writer(prefixes: Sequence[Path]) -> Iterator[None]:
    """Hold the locks of some prefixes, hidden files beside them that stay; the system frees them when a process dies.

    Raises:
        InputError: naming host and process of who holds one, or the folder that cannot be written.
    """
    with ExitStack() as stack:
        for prefix in prefixes:
            path = prefix.with_name(f".{prefix.name}.lock")
            lock = filelock.FileLock(path, blocking=False)
            try:
                stack.enter_context(lock)
            except filelock.Timeout:
                raise InputError(f"{prefix}: is being written by {_holder(path)}") from None
            except OSError as error:
                raise InputError(f"{path.parent}: cannot be written ({error.strerror or error})") from error
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T %Z')}\n")
        yield


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
