"""What a rank is at, which it tells with its heartbeat: one that hangs in a kernel lives, but gets no further."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

COMPUTES, WAITS, HAS_FINISHED = "computes", "waits for the others in", "has finished"
"""What a rank does with a step at its beginning and end; in between it says which forward passes it has done."""


class Progress(NamedTuple):
    """What a rank is at: after which part of a step, in words, and for how long."""

    step: int = 0
    part: int = 0
    what: str = HAS_FINISHED
    seconds: float = 0.0

    @property
    def place(self) -> tuple[int, int]:
        """Further is larger."""
        return self.step, self.part

    def __str__(self) -> str:
        return f"{self.what} step {self.step:,}, for {self.seconds:.0f} s"


class _Reports:
    """The last report that is true, and those after it that the device has still to make true."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reached, self.since = Progress(), time.monotonic()
        self.ahead: deque[tuple[Progress, Callable[[], bool]]] = deque()


_REPORTS = _Reports()


def report_progress(step: int, part: int, what: str, is_done: Callable[[], bool] = lambda: True) -> None:
    """Tell with the next heartbeats what this rank is at.

    Args:
        step: the step.
        part: how far it is; further is larger.
        what: it does, in words.
        is_done: whether the device is so far, too, which the host may be ahead of; asked by another thread.
    """
    with _REPORTS.lock:
        _REPORTS.ahead.append((Progress(step, part, what), is_done))
    progress()


def progress() -> Progress:
    """What this rank is at."""
    with _REPORTS.lock:
        while _REPORTS.ahead and _REPORTS.ahead[0][1]():
            _REPORTS.reached, _REPORTS.since = _REPORTS.ahead.popleft()[0], time.monotonic()
        return _REPORTS.reached._replace(seconds=time.monotonic() - _REPORTS.since)
