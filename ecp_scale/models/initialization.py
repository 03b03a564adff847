"""Weights as a function of (seed, parameter's name, element): equal for every layout of ranks and every padding.

Random numbers come from a generator that can begin anywhere (Philox, Salmon et al. 2011): every parameter has a stream
of 64-bit words, and two neighbouring elements of the whole tensor are made of one word. So a rank draws the words of
the elements that it holds, and no others.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor, nn

from ecp_scale.config import ModelConfig
from ecp_scale.models.inputs import PositionEmbedding, ValueEmbedding
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import ColumnLinear, Embedding, RowLinear
from ecp_scale.parallel.partition import Held, Partition, Run, Share

RESIDUAL_BRANCH_ENDS = ("attention.output", "attention.first_output", "feed_forward.down")
CHUNK = 1 << 17
"""Elements that are drawn at a time: they fit a processor's cache."""
BLOCK = 4
"""Words that Philox makes of one value of its counter."""


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float


@dataclass(frozen=True)
class Uniform:
    """Elements of at least -``bound`` and less than ``bound``."""

    bound: float

    def of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Two elements each of two fractions in [0, 1)."""
        return low.mul_(2 * self.bound).sub_(self.bound), high.mul_(2 * self.bound).sub_(self.bound)


@dataclass(frozen=True)
class Normal:
    """Elements with mean 0 and this standard deviation, by Box and Muller (1958)."""

    deviation: float

    def of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Two elements each of two fractions in [0, 1)."""
        radius = (1 - low).log_().mul_(-2).sqrt_().mul_(self.deviation)
        angle = high.mul_(2 * math.pi)
        return radius * angle.cos(), radius * angle.sin()


Values: TypeAlias = Constant | Uniform | Normal


def whole_share(parameter: nn.Parameter) -> Held:
    """That this process holds all of a parameter's share."""
    return Held(parameter.detach(), parameter.shape, 0)


@torch.no_grad()
def initialize(
    model: nn.Module,
    config: ModelConfig,
    parallel: ParallelContext,
    seed: int,
    held: Callable[[nn.Parameter], Held] = whole_share,
) -> None:
    """Fill every parameter in place, by ``config.initialization``; norms start as the identity.

    ``pytorch``: the ranges of nn.Linear and nn.Embedding. ``normal``: normal with std 0.02, biases 0.
    ``depth_scaled``: the same with 0.02 / sqrt(2L) for the last matrix of each residual branch (GPT-2's rule).

    Args:
        model: of any layout; its weights may have any type and lie on any device.
        config: of the model.
        parallel: this rank's groups.
        seed: of the run.
        held: what this rank holds of a parameter.
    """
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = _values(module, module_name, name, config)
            mine = held(parameter)
            share = Partition.of(parameter).share(mine.shape, parallel.tp_size, parallel.tp_rank)
            fill(mine, share, values, stream_key(seed, f"{module_name}.{name}"))


def stream_key(seed: int, name: str) -> int:
    """Which stream of random words belongs to a parameter: 128 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16])


def fill(mine: Held, share: Share, values: Values, key: int) -> None:
    """Fill what a rank holds of a parameter; padding becomes 0."""
    flat = mine.values.view(-1)
    if isinstance(values, Constant):
        flat.fill_(values.value)
        return
    words = _Words(key)
    for start in range(0, len(flat), CHUNK):
        chunk = torch.zeros(min(CHUNK, len(flat) - start))
        first = mine.start + start
        runs = list(share.runs(first, first + len(chunk)))
        if runs:
            _draw(chunk, [run._replace(start=run.start - first) for run in runs], words, values)
        flat[start : start + len(chunk)] = chunk


def _draw(chunk: Tensor, runs: list[Run], words: "_Words", values: Uniform | Normal) -> None:
    # All at once: a run may be a short piece of a row.
    spans = [(run.whole_start // 2, (run.whole_start + run.length + 1) // 2) for run in runs]
    elements = _elements(np.concatenate([words.read(*span) for span in spans]), values)
    if len(elements) == sum(run.length for run in runs):  # no run begins or ends inside a word
        chunk[: len(elements)] = elements
        return
    used = 0
    for run, (low, high) in zip(runs, spans, strict=True):
        begin = used + run.whole_start - 2 * low
        chunk[run.start :][: run.length] = elements[begin : begin + run.length]
        used += 2 * (high - low)


class _Words:
    """A stream of random 64-bit words that can be read from anywhere; forward, it is fast."""

    def __init__(self, key: int) -> None:
        self._philox = Philox(key=key)
        self._block = 0

    def read(self, start: int, stop: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        """Words from ``start`` up to ``stop``."""
        block, skipped = divmod(start, BLOCK)
        self._philox.advance(block - self._block)  # in values of the counter, whatever has been read of one
        self._block = -(-stop // BLOCK)
        return self._philox.random_raw(skipped + stop - start)[skipped:]


def _elements(words: "np.ndarray[tuple[int], np.dtype[np.uint64]]", values: Uniform | Normal) -> Tensor:
    """Two float32 elements of each word: 24 bits make a fraction."""
    halves = torch.from_numpy(words.view(np.int32)).view(-1, 2)
    low, high = (((half >> 8) & 0xFFFFFF).float().mul_(2.0**-24) for half in halves.unbind(1))
    return torch.stack(values.of(low, high), dim=1).flatten()


def _values(module: nn.Module, module_name: str, name: str, config: ModelConfig) -> Values:
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return Constant(1.0 if name == "weight" else 0.0)
    if config.initialization == "pytorch":
        if isinstance(module, Embedding | PositionEmbedding | ValueEmbedding):
            return Normal(1.0)
        assert isinstance(module, ColumnLinear | RowLinear | nn.Linear)
        inputs = module.in_features if isinstance(module, nn.Linear) else module.input_size
        return Uniform(1 / math.sqrt(inputs))
    if name == "bias":
        return Constant(0.0)
    ends_branch = module_name.endswith(RESIDUAL_BRANCH_ENDS)
    scaled = ends_branch and config.initialization == "depth_scaled"
    return Normal(0.02 / math.sqrt(2 * config.layers) if scaled else 0.02)
