"""What a launch says to its user, and where everything else goes that its libraries print.

Lines of ours go to the standard error that the program was started with; between ``quiet`` and its end, whatever else
writes to standard output or error (DeepSpeed, Megatron-core, torch, NCCL, in Python or in C) lands in a file.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

REMINDER_SECONDS = 4.5
_terminal: TextIO | None = None


def terminal() -> TextIO:
    """The standard error that the user sees."""
    return _terminal or sys.stderr


def say(text: str) -> None:
    """One line to the user, above a bar if there is one; nobody may be there to read it."""
    stream = terminal()
    with suppress(OSError, ValueError):
        if stream.isatty():
            from tqdm import tqdm

            tqdm.write(text, file=stream)
        else:
            print(text, file=stream, flush=True)


def counted(number: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@contextmanager
def waiting(text: str, prints: bool = True) -> Iterator[None]:
    """Say what the block does, and every few seconds that it still does; nothing where another rank does."""
    if not prints:
        yield
        return
    say(text)
    began, done = time.monotonic(), threading.Event()

    def remind() -> None:
        while not done.wait(REMINDER_SECONDS):
            say(f"{'':12}still running after {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what is printed in the block to the end of ``log``, but for ``say``.

    Raises:
        OSError: if the file cannot be opened.
    """
    global _terminal
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(1), os.dup(2)]
    _terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    try:
        for number in (1, 2):
            os.dup2(file, number)
        with warnings.catch_warnings():
            yield
    finally:
        for stream in streams:
            with suppress(OSError):
                stream.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(file)
        _terminal.close()
        _terminal = None
