"""Which corpus each sample of a run is of, by weight: arithmetic on the sample number, exact at every point of the run.

Weights are whole numbers after a common factor (0.7 and 0.3 are 7 and 3), and the order has a period: their sum. In
it, the k-th sample of a corpus of weight a has a window of time, from k / a to (k + 1) / a of the period, and of the
samples whose windows have begun the one that ends first is taken ("earliest deadline first", which meets all deadlines
where any order does). So behind every sample, each corpus is less than one sample from its share.

Where the sum is more than ``LONGEST_PERIOD``, the order is made in blocks of so many samples. How many of each corpus
lie before a block is exact to less than one sample, however far the run is; inside a block it is to less than two.
"""

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from ecp_scale.errors import InputError

LONGEST_PERIOD = 1 << 20
"""Most samples of a period or block, whose order is a table."""
LEAST_SHARE = 2 / LONGEST_PERIOD
"""Smallest share of a corpus among weights without a period."""
VERSION = "earliest deadline first"
"""Names this order where a run is known by it; another one is another order of samples."""


class Mixture:
    """The corpus of each sample, and its position in that corpus's own order."""

    def __init__(self, first_samples: Sequence[int], weights: Sequence[Sequence[float]]) -> None:
        """Phases begin at ``first_samples``, the first of them 0; ``weights`` (phases, corpora)."""
        assert first_samples[0] == 0
        self._starts = list(first_samples)
        self._phases = [_phase(whole_numbers(row)) for row in weights]
        self._before = [np.zeros(len(weights[0]), dtype=np.int64)]
        for phase, end in enumerate(self._starts[1:]):
            self._before.append(self._before[phase] + self._phases[phase].counts(end - self._starts[phase]))

    def phase(self, sample: int) -> int:
        """Which set of weights a sample is of."""
        return bisect_right(self._starts, sample) - 1

    def locate(self, sample: int) -> tuple[int, int]:
        """Corpus, and how many samples of it came before."""
        phase = self.phase(sample)
        corpus, earlier = self._phases[phase].locate(sample - self._starts[phase])
        return corpus, int(self._before[phase][corpus]) + earlier

    def counts(self, samples: int) -> npt.NDArray[np.int64]:
        """Samples of each corpus (corpora,) among the first of the run."""
        phase = bisect_right(self._starts, max(0, samples - 1)) - 1
        return self._before[phase] + self._phases[phase].counts(samples - self._starts[phase])


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers without a common factor: as they are written, 0.1 being a tenth."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    factor = lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * factor) for fraction in exact]
    return [number // gcd(*whole) for number in whole]


def _phase(weights: Sequence[int]) -> "_Blocks":
    """Blocks of equal counts where a period fits in one, else of counts that follow the weights.

    Raises:
        InputError: if a share is too small for a block.
    """
    total = sum(weights)
    if total <= LONGEST_PERIOD:
        return _Blocks(weights, total)
    small = [number for number, weight in enumerate(weights) if 0 < weight < LEAST_SHARE * total]
    if small:
        raise InputError(
            f"data.blend: corpus number {small[0] + 1} has a share of {weights[small[0]] / total:.1e} (so few have "
            f"{len(small)}), expected at least {LEAST_SHARE:.1e}; leave it out, or give weights that are parts of at "
            f"most {LONGEST_PERIOD}"
        )
    return _Blocks(weights, LONGEST_PERIOD)


class _Blocks:
    """One set of whole weights, in blocks of ``size`` samples."""

    def __init__(self, weights: Sequence[int], size: int) -> None:
        self._size = size
        self._total = sum(weights)
        self._ends = [0, *itertools.accumulate(weights)]

    def locate(self, sample: int) -> tuple[int, int]:
        block, place = divmod(sample, self._size)
        before, corpora, earlier = self._block(block)
        corpus = int(corpora[place])
        return corpus, before[corpus] + int(earlier[place])

    def counts(self, samples: int) -> npt.NDArray[np.int64]:
        block, rest = divmod(samples, self._size)
        before, corpora, _ = self._block(block)
        return np.array(before, dtype=np.int64) + np.bincount(corpora[:rest], minlength=len(before))

    def _before(self, block: int) -> list[int]:
        """Samples of each corpus before a block: differences of rounded running sums, hence less than one off."""
        samples = block * self._size
        ends = [end * samples // self._total for end in self._ends]
        return [end - start for start, end in itertools.pairwise(ends)]

    @lru_cache(maxsize=2)  # noqa: B019  (one object per phase of a run)
    def _block(self, block: int) -> tuple[list[int], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Samples of each corpus before a block; the corpus of each place, and how many of it the block has before."""
        before = self._before(block)
        counts = tuple(after - count for count, after in zip(before, self._before(block + 1), strict=True))
        return before, *_earliest_deadline_first(counts)


@lru_cache(maxsize=4)
def _earliest_deadline_first(weights: tuple[int, ...]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The corpus of each place of a period of the sum of the weights, and how many places of it come before."""
    period = sum(weights)
    corpora, earlier = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
    begun = [(0, corpus) for corpus, weight in enumerate(weights) if weight]  # sorted, hence a heap
    ready: list[tuple[int, int]] = []
    taken = [0] * len(weights)
    for place in range(period):
        while begun and begun[0][0] <= place:
            _, corpus = heapq.heappop(begun)
            heapq.heappush(ready, (-(-(taken[corpus] + 1) * period // weights[corpus]), corpus))
        _, corpus = heapq.heappop(ready)
        corpora[place], earlier[place] = corpus, taken[corpus]
        taken[corpus] += 1
        if taken[corpus] < weights[corpus]:
            heapq.heappush(begun, (taken[corpus] * period // weights[corpus], corpus))
    return corpora, earlier
