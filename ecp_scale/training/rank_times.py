"""Where the ranks of a run spend their steps, and which of them are slow.

Every rank adds its times to the message about the loss, at its own place in a list of zeros; the sum over ranks is the
list of all. What a device did is known when its step is done, so a message has the times of the step before.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

MICRO = 1_000_000
"""Times travel as whole microseconds."""
WINDOW = 50
"""Steps over which a rank is judged."""
SLOW = 1.5
"""A rank is slow whose forward passes take so many times those of the median rank, at the median of its steps."""
STARVED = 0.1
"""A rank is starved that waits for its data for so much of a step, at the median of its steps."""


class RankTimes(NamedTuple):
    """Seconds of one rank in one step."""

    data: float
    """It waited for its batch."""
    forward: float
    """Its forward passes, on its device. Backward passes and updates hold messages, in which the fast ones wait."""
    wait: float
    """The message about the loss, in which the fast ones wait, too."""


FIELDS = len(RankTimes._fields)


def as_numbers(times: RankTimes | None, rank: int, ranks: int) -> list[int]:
    """What a rank adds to the message; zeros where it has no times yet, nothing where it is alone."""
    found = [0] * (FIELDS * ranks) if ranks > 1 else []
    if found and times is not None:
        found[FIELDS * rank : FIELDS * (rank + 1)] = [round(MICRO * seconds) for seconds in times]
    return found


def of_all(numbers: Sequence[int]) -> list[RankTimes]:
    """The times of all ranks in their order; none where they have not been told."""
    if not any(numbers):
        return []
    starts = range(0, len(numbers), FIELDS)
    return [RankTimes(*(number / MICRO for number in numbers[start : start + FIELDS])) for start in starts]


def summary(times: Sequence[RankTimes]) -> dict[str, Any]:
    """By field the least, median and most seconds over the ranks, and the rank that has most."""
    found: dict[str, Any] = {}
    for name in RankTimes._fields if times else ():
        values = [getattr(one, name) for one in times]
        most = max(values)
        told = {"min": min(values), "median": statistics.median(values), "max": most, "rank": values.index(most)}
        found[f"ranks_{name}_seconds"] = told
    return found


class SlowRanks:
    """Finds ranks that keep the others waiting, step after step."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Args:
        hosts: of every rank.
        """
        self._hosts = hosts
        self._forward: list[deque[float]] = [deque(maxlen=WINDOW) for _ in hosts]
        self._data: list[deque[float]] = [deque(maxlen=WINDOW) for _ in hosts]
        self._named: set[tuple[int, str]] = set()

    def look(self, times: Sequence[RankTimes], step_seconds: float) -> list[tuple[int, str]]:
        """Take the times of all ranks in a step that took ``step_seconds``; return ranks that are slow, with words.

        Each is named once. Ranks of a tensor or context group wait for each other in their forward passes, so that a
        slow one among them shows as all of its group.
        """
        usual = statistics.median_low(one.forward for one in times) if times else 0.0
        found = []
        for rank, one in enumerate(times):
            self._forward[rank].append(one.forward / usual if usual else 1.0)
            self._data[rank].append(one.data / step_seconds)
            if len(self._data[rank]) < WINDOW:
                continue
            slow, starved = (statistics.median_high(of[rank]) for of in (self._forward, self._data))
            if slow >= SLOW:
                found.append((rank, f"takes {slow:.1f} times as long for its forward passes as the median rank"))
            if starved >= STARVED:
                found.append((rank, f"waits for its data for {100 * starved:.0f} % of a step"))
        new = [(rank, text) for rank, text in found if (rank, text[0]) not in self._named]
        self._named |= {(rank, text[0]) for rank, text in new}
        return [(rank, f"rank {rank} on host {self._hosts[rank]} {text}") for rank, text in new]
