"""Activation checkpointing (arXiv 1604.06174): compute again in the backward pass what the forward did not keep."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ecp_scale.parallel.random import TENSOR_PARALLEL


@dataclass(frozen=True)
class Pass:
    """Which pass over the current computation this is. ``received``: messages of a first one, which come once."""

    which: Literal["only", "first", "again"] = "only"
    received: deque[Tensor] = field(default_factory=deque)


PASS: ContextVar[Pass] = ContextVar("pass", default=Pass())  # noqa: B039, an only pass keeps nothing


def recomputed(function: Callable[..., Tensor], *arguments: Any, random: bool) -> Tensor:
    """``function(*arguments)``, of which nothing but the arguments is kept for the backward pass.

    Args:
        function: what to compute; the second time it must compute the same.
        arguments: what it takes.
        random: whether it draws random numbers; the second time it then draws the same, from both streams of
            ``ecp_scale.parallel.random``.
    """

    def contexts() -> tuple[Any, Any]:
        received: deque[Tensor] = deque()  # of this call alone: others may lie between it and its backward pass
        state = TENSOR_PARALLEL.state
        return _in(Pass("first", received)), _again(state if random else None, Pass("again", received))

    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=random, context_fn=contexts)


@contextmanager
def _again(state: Tensor | None, this: Pass) -> Iterator[None]:
    """A second pass, which draws from ``state`` of the tensor-parallel stream on; None where it draws nothing."""
    present = TENSOR_PARALLEL.state
    if state is not None:
        TENSOR_PARALLEL.state = state
    try:
        with _in(this):
            yield
    finally:
        TENSOR_PARALLEL.state = present


@contextmanager
def _in(this: Pass) -> Iterator[None]:
    token = PASS.set(this)
    try:
        yield
    finally:
        PASS.reset(token)
