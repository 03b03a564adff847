"""What enters the first layer of a classifier besides the embedding of tokens: values, and learnt positions.

Shapes: N positions, B batch, D width. With sequence parallelism every rank holds N/t positions of the residual stream.
"""

import torch
from torch import Tensor, nn

from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import with_summed_gradient


class _Replicated(nn.Module):
    """Rows that every rank of the tensor-parallel group has, and uses on the positions that it holds."""

    def __init__(self, rows: int, width: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=parallel.dtype))
        self.group = parallel.tp_group if parallel.sequence_parallel else None

    def rows(self) -> Tensor:
        """The weight (rows, D), whose gradient is summed over the ranks where each has a part of it."""
        return with_summed_gradient(self.weight, self.group)

    def held(self, positions: Tensor) -> Tensor:
        """Of something for every position (N, ...), what belongs to those that this rank holds."""
        if self.group is None:
            return positions
        return positions.chunk(self.group.size())[self.group.rank()]


class ValueEmbedding(_Replicated):
    """Linear map of the values 0 to 255, taken to -1 to 1: the first row, and the second times the value."""

    def __init__(self, width: int, parallel: ParallelContext) -> None:
        super().__init__(2, width, parallel)

    def forward(self, values: Tensor) -> Tensor:
        """Embed values (B, N) -> (N or N/t, B, D)."""
        constant, slope = self.rows()
        # Trap: v / 127.5 - 1 would cancel in bf16; odd numbers up to 255 are exact there.
        scaled = ((2 * self.held(values.t()) - 255).to(self.weight.dtype) / 255).unsqueeze(-1)
        return torch.addcmul(constant, scaled, slope)


class PositionEmbedding(_Replicated):
    """A learnt vector for every position of a window."""

    def forward(self, x: Tensor) -> Tensor:
        """Add those of all positions to what enters the first layer (N or N/t, B, D)."""
        return x + self.held(self.rows()).unsqueeze(1)
