"""Batches of one rank: which windows a step reads, as arithmetic on sample numbers."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ecp_scale.config import TrainingConfig
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.digest import PARTS, to_parts


class StepBatches(NamedTuple):
    """What one rank reads for one step: micro-batches (micro, n + 1), and what they add to the data digest."""

    micro_batches: list[Tensor]
    digest_parts: list[int]


class TrainingBatches:
    """Micro-batches of one data-parallel rank.

    Sample k of the run is the same window whatever the number of ranks, the micro-batch or the accumulation; ranks of
    one tensor group read the same ones from the memory map.
    """

    def __init__(self, blend: Blend, config: TrainingConfig, ranks: int, rank: int) -> None:
        self.blend = blend
        self.micro = config.micro_batch_size
        self.ranks = ranks
        self.rank = rank

    def after(self, tokens: int, sequences: int) -> StepBatches:
        """The step of ``sequences`` samples that follows ``tokens`` tokens."""
        stride = self.micro * self.ranks
        micro_batches, digest = [], [0] * PARTS
        for start in range(self.rank * self.micro, sequences, stride):
            rows = []
            for sample in self.blend.samples(tokens + start * self.blend.sequence_length, self.micro):
                corpus, window = self.blend.locate(sample)
                rows.append(self.blend.read(corpus, window))
                parts = to_parts(self.blend.digest(sample, corpus, window))
                digest = [total + part for total, part in zip(digest, parts, strict=True)]
            micro_batches.append(torch.from_numpy(np.stack(rows)))
        return StepBatches(micro_batches, digest)


class ReadAhead:
    """Reads the next step in a thread while one is computed; what a step reads is the same with and without."""

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._next: tuple[tuple[int, int], Future[StepBatches]] | None = None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def after(self, tokens: int, sequences: int, then: tuple[int, int] | None) -> StepBatches:
        """``TrainingBatches.after``; ``then`` is what it will be asked for next, None at the end.

        Raises:
            DamagedDataError: of this step; one that is read ahead raises when it is asked for.
        """
        asked, ahead = (tokens, sequences), self._next
        known = ahead is not None and ahead[0] == asked
        reading = ahead[1] if ahead is not None and known else self._thread.submit(self._batches.after, *asked)
        found = reading.result()
        self._next = None if then is None else (then, self._thread.submit(self._batches.after, *then))
        return found


def validation_batches(corpus: Corpus, config: TrainingConfig, ranks: int, rank: int) -> Iterator[tuple[Tensor, int]]:
    """This rank's share of the first windows, in order: batches (micro, n + 1) and how many of their rows count.

    Every rank gets as many batches, as the collectives inside a forward pass require; surplus rows do not count.
    """
    windows = min(config.validation_windows, corpus.windows)
    stride = config.micro_batch_size * ranks
    for first in range(rank * config.micro_batch_size, -(-windows // stride) * stride, stride):
        numbers = range(first, first + config.micro_batch_size)
        counted = sum(number < windows for number in numbers)
        yield stack(corpus, [min(number, windows - 1) for number in numbers]), counted


def stack(corpus: Corpus, windows: list[int]) -> Tensor:
    """Windows as rows (len(windows), n + 1) of int64 ids."""
    return torch.from_numpy(np.stack([corpus.window(number) for number in windows]))
