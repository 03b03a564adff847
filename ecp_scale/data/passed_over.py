"""Samples that a run passes over, as those around a spike of the loss: arithmetic on sample numbers, nothing is stored.

A run reads the samples 0, 1, 2, ... of its order but for those in some ranges. The numbers of the others stay what they
are, so that a window has the same number, and the same part of the data digest, with and without.
"""

import itertools
from bisect import bisect_right
from collections.abc import Mapping


def union(*of: Mapping[int, int]) -> dict[int, int]:
    """What is in any of some ranges, in order and in as few ranges as there can be."""
    found: dict[int, int] = {}
    for start, end in sorted(pair for ranges in of for pair in ranges.items()):
        newest = max(found, default=None)
        if newest is not None and start <= found[newest] + 1:
            found[newest] = max(found[newest], end)
        else:
            found[start] = end
    return found


class PassedOver:
    """The samples that are left when some ranges are passed over."""

    def __init__(self, ranges: Mapping[int, int] | None = None) -> None:
        """Args:
        ranges: first and last sample of each, apart from each other.
        """
        self.ranges = union(ranges or {})
        sizes = [last - first + 1 for first, last in self.ranges.items()]
        self._before = [0, *itertools.accumulate(sizes)]
        # From which position on a range is behind: its first sample, less what was passed over before it.
        self._positions = [first - self._before[number] for number, first in enumerate(self.ranges)]

    def sample(self, position: int) -> int:
        """The sample number of the one that a run reads at ``position``, counted from 0."""
        return position + self._before[bisect_right(self._positions, position)]

    def reached(self, samples: int) -> int:
        """How many samples of the order are behind, read or passed over, when a run has read so many."""
        return self.sample(samples - 1) + 1 if samples else 0

    def behind(self, samples: int) -> dict[int, int]:
        """The ranges that a run has passed over when it has read so many samples."""
        return {first: last for first, last in self.ranges.items() if first < self.reached(samples)}
