"""Which corpus each sample of a run is of, by weight: arithmetic on the sample number, exact at every point of the run.

Weights are whole numbers after a common factor (0.7 and 0.3 are 7 and 3), so that the order has a period, their sum. In
it, the k-th sample of a corpus of weight a has a window of time, from k / a to (k + 1) / a of the period, and of the
samples whose windows have begun the one that ends first is taken ("earliest deadline first", which meets all deadlines
where any order does). So behind every sample, each corpus is less than one sample from its share.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from ecp_scale.errors import InputError

LONGEST_PERIOD = 1 << 20
"""Weights whose sum is larger, as whole numbers, are rounded to so many parts in all."""
VERSION = "earliest deadline first"
"""Names this order where a run is known by it; another one is another order of samples."""


class Mixture:
    """The corpus of each sample, and its position in that corpus's own order."""

    def __init__(self, first_samples: Sequence[int], weights: Sequence[Sequence[float]]) -> None:
        """Phases begin at ``first_samples``, the first of them 0; ``weights`` (phases, corpora)."""
        assert first_samples[0] == 0
        self._starts = list(first_samples)
        self._phases = [_Phase(whole_weights(row)) for row in weights]
        self._before = [np.zeros(len(weights[0]), dtype=np.int64)]
        for phase, end in enumerate(self._starts[1:]):
            self._before.append(self._before[phase] + self._phases[phase].counts(end - self._starts[phase]))

    def locate(self, sample: int) -> tuple[int, int]:
        """Corpus, and how many samples of it came before."""
        phase = bisect_right(self._starts, sample) - 1
        corpus, earlier = self._phases[phase].locate(sample - self._starts[phase])
        return corpus, int(self._before[phase][corpus]) + earlier

    def counts(self, samples: int) -> npt.NDArray[np.int64]:
        """Samples of each corpus (corpora,) among the first of the run."""
        phase = bisect_right(self._starts, max(0, samples - 1)) - 1
        return self._before[phase] + self._phases[phase].counts(samples - self._starts[phase])


class _Phase:
    """One set of whole weights."""

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = np.array(weights, dtype=np.int64)
        self._period = int(self._weights.sum())

    def locate(self, sample: int) -> tuple[int, int]:
        period, place = divmod(sample, self._period)
        corpora, earlier = self._order
        corpus = int(corpora[place])
        return corpus, period * int(self._weights[corpus]) + int(earlier[place])

    def counts(self, samples: int) -> npt.NDArray[np.int64]:
        periods, rest = divmod(samples, self._period)
        corpora, _ = self._order
        return periods * self._weights + np.bincount(corpora[:rest], minlength=len(self._weights))

    @cached_property
    def _order(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Corpus of each place of the period, and how many places of that corpus come before it."""
        weights, period = self._weights.tolist(), self._period
        corpora, earlier = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
        released = [(0, corpus) for corpus, weight in enumerate(weights) if weight]  # sorted, hence a heap
        ready: list[tuple[int, int]] = []
        taken = [0] * len(weights)
        for place in range(period):
            while released and released[0][0] <= place:
                _, corpus = heapq.heappop(released)
                heapq.heappush(ready, (-(-(taken[corpus] + 1) * period // weights[corpus]), corpus))
            _, corpus = heapq.heappop(ready)
            corpora[place], earlier[place] = corpus, taken[corpus]
            taken[corpus] += 1
            if taken[corpus] < weights[corpus]:
                heapq.heappush(released, (taken[corpus] * period // weights[corpus], corpus))
        return corpora, earlier


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers without a common factor, exact where their sum is at most ``LONGEST_PERIOD``.

    Raises:
        InputError: if there are more corpora than ``LONGEST_PERIOD``.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]  # as they are written: 0.1 is a tenth
    factor = lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * factor) for fraction in exact]
    common = gcd(*whole)
    whole = [number // common for number in whole]
    return whole if sum(whole) <= LONGEST_PERIOD else _rounded(whole)


def _rounded(whole: Sequence[int]) -> list[int]:
    """Parts of ``LONGEST_PERIOD``: at least one for any weight, the rest by the largest remainders."""
    used = [number for number, weight in enumerate(whole) if weight]
    if len(used) > LONGEST_PERIOD:
        raise InputError(f"data.blend has {len(used)} corpora, expected at most {LONGEST_PERIOD}")
    total, parts = sum(whole), [0] * len(whole)
    for number in used:
        parts[number] = max(1, whole[number] * LONGEST_PERIOD // total)
    missing = LONGEST_PERIOD - sum(parts)
    sign = 1 if missing > 0 else -1
    by_error = sorted(used, key=lambda number: sign * (parts[number] * total - whole[number] * LONGEST_PERIOD))
    while missing:
        for number in by_error:
            if missing and parts[number] + sign >= 1:
                parts[number] += sign
                missing -= sign
    return parts
