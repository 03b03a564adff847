"""What a rank is at, which it tells with its heartbeat: one that hangs in a kernel lives, but gets no further."""

import time
from typing import NamedTuple

COMPUTES, WAITS, HAS_FINISHED = "computes", "waits for the others in", "has finished"
"""What a rank does with a step, in this order."""
_ORDER = (COMPUTES, WAITS, HAS_FINISHED)


class Progress(NamedTuple):
    """What a rank is at: ``phase`` of a step, and for how long."""

    step: int = 0
    phase: str = HAS_FINISHED
    seconds: float = 0.0

    @property
    def place(self) -> tuple[int, int]:
        """Further is larger."""
        return self.step, _ORDER.index(self.phase)

    def __str__(self) -> str:
        return f"{self.phase} step {self.step:,}, for {self.seconds:.0f} s"


class _Reached:
    """Where this rank is."""

    progress = Progress()
    since = time.monotonic()


def progress() -> Progress:
    """What this rank is at."""
    return _Reached.progress._replace(seconds=time.monotonic() - _Reached.since)


def report_progress(step: int, phase: str) -> None:
    """Tell with the next heartbeats what this rank is at."""
    _Reached.progress, _Reached.since = Progress(step, phase), time.monotonic()
