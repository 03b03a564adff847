"""Between a whole tensor and the share of one rank, by what the parameters say of themselves."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ecp_scale.errors import InputError
from ecp_scale.parallel.context import ParallelContext


class Held(NamedTuple):
    """What a rank holds of its share of a parameter."""

    values: Tensor
    """Contiguous; ZeRO-3 pads the last ranks' beyond the share's end."""
    shape: Sequence[int]
    """Of the share."""
    start: int
    """Number in the share of the first element that is held."""


class Run(NamedTuple):
    """Consecutive elements of a share that are consecutive in the whole tensor too."""

    start: int
    """The first one's number in the share."""
    whole_start: int
    """The first one's number in the whole tensor."""
    length: int


class Common(NamedTuple):
    """Elements that two shares have in common: ``rows`` runs of ``length``, consecutive in the other share."""

    target: int
    """Place of the first one among those that were asked for."""
    stride: int
    """From one run to the next there."""
    source: int
    """Number of the first one in the other share."""
    length: int
    rows: int


@dataclass(frozen=True)
class Share:
    """Where the elements of one rank's share lie in the whole tensor, both flat: ``rows`` runs of ``width`` elements.

    Row r of the share is what begins at element ``first`` + r ``stride`` of the whole tensor. Padding of the
    vocabulary lies behind all elements of the whole tensor.
    """

    rows: int
    width: int
    stride: int
    first: int
    whole: int
    """Elements of the whole tensor, without padding."""

    @property
    def elements(self) -> int:
        """Of the share, padding included."""
        return self.rows * self.width

    def in_rows(self, rows: int) -> "Share":
        """The same elements as so many runs, where the share is the whole tensor or has as many."""
        if rows == self.rows:
            return self
        assert self.rows == 1
        return Share(rows, self.width // rows, self.stride // rows, self.first, self.whole)

    def common(self, start: int, stop: int, other: "Share") -> Iterator["Common"]:
        """What of the elements ``start`` to ``stop`` is in the share of another layout of the same tensor."""
        rows = max(self.rows, other.rows)
        mine, theirs = self.in_rows(rows), other.in_rows(rows)
        # In whole rows of the tensor; where those are one, the vocabulary's padding lies behind it.
        left = max(mine.first, theirs.first)
        right = min(mine.first + mine.width, theirs.first + theirs.width, mine.whole if rows == 1 else mine.stride)
        for row, count, begin, end in _by_row(start, min(stop, mine.elements), mine.width):
            low, high = max(left, mine.first + begin), min(right, mine.first + end)
            if low >= high:
                continue
            together = count if high - low == theirs.width else 1
            for first in range(row, row + count, together):
                target = first * mine.width + low - mine.first - start
                yield Common(target, mine.width, first * theirs.width + low - theirs.first, high - low, together)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """What of the whole tensor the elements ``start`` to ``stop`` of the share are, without padding."""
        stop = min(stop, self.elements)
        while start < stop:
            row, column = divmod(start, self.width)
            length = min(self.width - column, stop - start)
            whole_start = self.first + row * self.stride + column
            if whole_start < self.whole:
                yield Run(start, whole_start, min(length, self.whole - whole_start))
            start += length


def _by_row(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Consecutive elements as rows of ``width``: the first row, how many, and from which column to which."""
    while start < stop:
        row, column = divmod(start, width)
        count = 1 if column else max(1, (stop - start) // width)
        end = min(width, column + stop - start)
        yield row, count, column, end
        start += (count - 1) * width + end - column


@dataclass(frozen=True)
class Partition:
    """How one parameter is stored.

    ``partition_dim`` is the dimension that the tensor group splits, None where every rank holds all of it;
    ``vocabulary_rows`` the rows that are not padding, None where there is no padding.
    """

    partition_dim: int | None
    vocabulary_rows: int | None = None

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "Partition":
        """Read the attributes that Megatron-core and the language model set."""
        sharded = getattr(parameter, "tensor_model_parallel", False)
        partition_dim = getattr(parameter, "partition_dim", None) if sharded else None
        return cls(partition_dim, getattr(parameter, "vocabulary_rows", None))

    def share(self, shape: Sequence[int], size: int, rank: int) -> Share:
        """Where the share of one rank lies in the whole tensor.

        Args:
            shape: of the share.
            size: of the tensor group.
            rank: in it.
        """
        parts = 1 if self.partition_dim is None else size
        rows = math.prod(shape[: self.partition_dim or 0]) if parts > 1 else 1
        width = math.prod(shape) // rows
        whole = rows * width * parts
        if self.vocabulary_rows is not None:
            whole = self.vocabulary_rows * math.prod(shape[1:])
        return Share(rows, width, width * parts, width * rank if parts > 1 else 0, whole)

    def whole_shape(self, shape: Sequence[int], size: int) -> list[int]:
        """Shape of the whole tensor, without padding, from that of a share among ``size``."""
        whole = list(shape)
        if self.partition_dim is not None:
            whole[self.partition_dim] *= size
        if self.vocabulary_rows is not None:
            whole[0] = self.vocabulary_rows
        return whole

    def split(self, whole: "Sliceable", size: int, rank: int, padded_rows: int) -> Tensor:
        """The share of one rank; nothing else is read. The vocabulary's padding rows are 0.

        Args:
            whole: the whole tensor, without padding.
            size: of the tensor group.
            rank: in it.
            padded_rows: of the whole tensor, with the padding of the vocabulary, where there is any.
        """
        rows = padded_rows // size if self.partition_dim == 0 else padded_rows
        if self.partition_dim is None:
            share = whole[:]
        else:
            before, there = self.partition_dim, whole.shape[self.partition_dim]
            padded = padded_rows if self.vocabulary_rows is not None else there
            length = padded // size
            first = min(rank * length, there - 1)  # of a share that is all padding one row is read
            share = whole[(slice(None),) * before + (slice(first, min(first + length, there)),)]
            if rank * length > first:
                share = share[:0]
        if self.vocabulary_rows is None:
            return share
        return torch.cat((share, share.new_zeros(rows - share.shape[0], *share.shape[1:])))


class Sliceable(Protocol):
    """A tensor, or what reads a part of one when it is asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole."""

    def __getitem__(self, index: Any, /) -> Tensor:
        """A part, by a slice or a tuple of slices."""


def partitions(model: nn.Module) -> dict[str, Partition]:
    """Partition of every parameter, by name."""
    return {name: Partition.of(parameter) for name, parameter in model.named_parameters()}


def full_shape(parameter: nn.Parameter, size: int) -> list[int]:
    """Shape of the parameter without sharding and without padding."""
    return Partition.of(parameter).whole_shape(parameter.shape, size)


@torch.no_grad()
def load_full(model: nn.Module, parallel: ParallelContext, tensors: Mapping[str, Sliceable], source: str) -> None:
    """Fill a model with this rank's share of whole tensors.

    Raises:
        InputError: if names or shapes differ, listing all of them.
    """
    parameters = dict(model.named_parameters())
    problems = [f"{name} is missing" for name in parameters.keys() - tensors.keys()]
    problems += [f"{name} is not part of this model" for name in tensors.keys() - parameters.keys()]
    for name in parameters.keys() & tensors.keys():
        found, expected = list(tensors[name].shape), full_shape(parameters[name], parallel.tp_size)
        if found != expected:
            problems.append(f"{name} has shape {found}, expected {expected}")
    if problems:
        raise InputError(f"{source} does not fit the model:\n" + "\n".join(f"  - {text}" for text in sorted(problems)))
    for name, parameter in parameters.items():
        padded_rows = parameter.shape[0] * parallel.tp_size
        parameter.copy_(Partition.of(parameter).split(tensors[name], parallel.tp_size, parallel.tp_rank, padded_rows))
