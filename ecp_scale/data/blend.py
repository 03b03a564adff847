"""Several corpora by weight, as a function of the sample number: nothing is stored, and nothing repeats or is skipped.

Samples come in periods of ``PERIOD``. In each, every corpus has its share of places, in an order of its own; the i-th
place of a corpus, counted from the beginning of the run over all changes of weights, takes the i-th window of the
corpus's own order. So the state of a run is one integer per corpus, and the sample number tells it.
"""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from ecp_scale.data.corpus import Corpus
from ecp_scale.data.order import Permutation, SampleOrder
from ecp_scale.data.shards import Tokens
from ecp_scale.errors import InputError

PERIOD = 1024
"""Samples after which the shares are exact; the finest weight is one in so many."""


class Blend:
    """The corpora of a run and the phases of their weights."""

    def __init__(self, phases: Sequence[tuple[int, Mapping[str, float]]], sequence_length: int, seed: int) -> None:
        """Open the corpora.

        Args:
            phases: from how many tokens of the run on, which weight each shard prefix has; the first from 0.
            sequence_length: tokens of a window, n.
            seed: of the orders.

        Raises:
            InputError: if a corpus cannot be used, or was made with another tokenizer than the first.
        """
        names = list(dict.fromkeys(name for _, weights in phases for name in weights))
        self.corpora = [Corpus(name, sequence_length) for name in names]
        first = self.corpora[0]
        for corpus in self.corpora[1:]:
            if corpus.tokenizer.sha256 != first.tokenizer.sha256:
                raise InputError(
                    f"corpus {corpus.prefix} was made with tokenizer {corpus.tokenizer.sha256[:12]}..., "
                    f"{first.prefix} with {first.tokenizer.sha256[:12]}..."
                )
        self.sequence_length = sequence_length
        self.from_tokens = [tokens for tokens, _ in phases]
        self.weights = [[weights.get(name, 0.0) for name in names] for _, weights in phases]
        orders = [SampleOrder(corpus.windows, seed, number) for number, corpus in enumerate(self.corpora)]
        self.mixture = Mixture([-(-tokens // sequence_length) for tokens in self.from_tokens], self.weights, seed)
        self._orders = orders

    def locate(self, sample: int) -> tuple[int, int]:
        """Corpus and window of a sample of the run."""
        corpus, position = self.mixture.locate(sample)
        return corpus, self._orders[corpus].window(position)

    def read(self, corpus: int, window: int) -> Tokens:
        """The n + 1 tokens of a window, as int64."""
        return self.corpora[corpus].window(window)

    def history(self, tokens: int) -> dict[str, object]:
        """What decided the samples of the first ``tokens`` tokens: weights, and sizes of the corpora that had any."""
        begun = [number for number, start in enumerate(self.from_tokens) if start < max(1, tokens)]
        used = 1 + max(i for number in begun for i, weight in enumerate(self.weights[number]) if weight)
        return {
            "corpora_tokens": [corpus.tokens for corpus in self.corpora[:used]],
            "blend": [[self.from_tokens[number], self.weights[number][:used]] for number in begun],
        }


class Mixture:
    """Which corpus each sample is of, and its position in that corpus's own order."""

    def __init__(self, first_samples: Sequence[int], weights: Sequence[Sequence[float]], seed: int) -> None:
        """Phases begin at ``first_samples``, the first of them 0; ``weights`` (phases, corpora)."""
        assert first_samples[0] == 0
        self._starts = list(first_samples)
        self._shares = [shares_of(row) for row in weights]
        self._seed = seed
        self._before = [np.zeros(len(weights[0]), dtype=np.int64)]
        for phase, end in enumerate(self._starts[1:]):
            self._before.append(self._before[phase] + self._counts(phase, end - self._starts[phase]))

    def locate(self, sample: int) -> tuple[int, int]:
        """Corpus, and how many samples of it came before."""
        phase = bisect_right(self._starts, sample) - 1
        period, place = divmod(sample - self._starts[phase], PERIOD)
        corpora, earlier = self._period(phase, period)
        corpus = int(corpora[place])
        whole = period * int(self._shares[phase][corpus])
        return corpus, int(self._before[phase][corpus]) + whole + int(earlier[place])

    def _counts(self, phase: int, samples: int) -> "np.ndarray":
        """Samples of each corpus among the first of a phase."""
        periods, rest = divmod(samples, PERIOD)
        corpora, _ = self._period(phase, periods)
        return periods * self._shares[phase] + np.bincount(corpora[:rest], minlength=len(self._shares[phase]))

    @lru_cache(maxsize=8)  # noqa: B019  (one object per run)
    def _period(self, phase: int, period: int) -> "tuple[np.ndarray, np.ndarray]":
        """Corpus of each place of a period, and how many places of that corpus come before it in the period."""
        slots = np.repeat(np.arange(len(self._shares[phase])), self._shares[phase])
        permutation = Permutation(PERIOD, f"{self._seed}/blend/{phase}/{period}")
        corpora = slots[[permutation(place) for place in range(PERIOD)]]
        earlier = np.empty(PERIOD, dtype=np.int64)
        for corpus in np.unique(corpora):
            places = np.flatnonzero(corpora == corpus)
            earlier[places] = np.arange(len(places))
        return corpora, earlier


def shares_of(weights: Sequence[float]) -> "np.ndarray":
    """Places of each corpus in a period: its weight's share, rounded so that they add up, at least 1 for any weight."""
    array = np.array(weights, dtype=np.float64)
    exact = array / array.sum() * PERIOD
    shares = np.maximum(np.floor(exact).astype(np.int64), (array > 0).astype(np.int64))
    while shares.sum() != PERIOD:
        missing = 1 if shares.sum() < PERIOD else -1
        error = np.where((shares + missing >= 1) & (array > 0), (exact - shares) * missing, -np.inf)
        shares[int(np.argmax(error))] += missing
    return shares


LANES = 4
"""A ledger entry travels as so many 16-bit numbers, whose sums over ranks and samples stay exact in int64."""


def ledger_entry(sample: int, corpus: int, window: int) -> int:
    """64 bits that stand for "sample number ``sample`` was this window"; entries add up modulo 2^64."""
    packed = struct.pack("<QQQ", sample, corpus, window)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def to_lanes(entry: int) -> list[int]:
    """The 16-bit parts of an entry, lowest first."""
    return [(entry >> (16 * lane)) & 0xFFFF for lane in range(LANES)]


def from_lanes(lanes: Sequence[int]) -> int:
    """The sum of entries from the sums of their parts."""
    return sum(value << (16 * lane) for lane, value in enumerate(lanes)) % 2**64
