"""Batches of one rank: which windows a step reads, as arithmetic on sample numbers."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ecp_scale.config import TrainingConfig
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.digest import PARTS, to_parts


class TrainingBatches:
    """Micro-batches of one data-parallel rank.

    Sample k of the run is the same window whatever the number of ranks, the micro-batch or the accumulation; ranks of
    one tensor group read the same ones from the memory map.
    """

    def __init__(self, blend: Blend, config: TrainingConfig, ranks: int, rank: int) -> None:
        self.blend = blend
        # The digest of what this rank has read of the step that ``after`` was last asked for.
        self.digest_parts = [0] * PARTS
        self.micro = config.micro_batch_size
        self.ranks = ranks
        self.rank = rank

    def after(self, tokens: int, sequences: int) -> Iterator[Tensor]:
        """Micro-batches (micro, n + 1) of the step of ``sequences`` samples that follows ``tokens`` tokens."""
        stride = self.micro * self.ranks
        first = tokens // self.blend.sequence_length + self.rank * self.micro
        self.digest_parts = [0] * PARTS
        for start in range(first, first + sequences, stride):
            rows = []
            for sample in range(start, start + self.micro):
                corpus, window = self.blend.locate(sample)
                rows.append(self.blend.read(corpus, window))
                parts = to_parts(self.blend.digest(sample, corpus, window))
                self.digest_parts = [total + part for total, part in zip(self.digest_parts, parts, strict=True)]
            yield torch.from_numpy(np.stack(rows))


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
