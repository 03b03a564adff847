"""Activation checkpointing (arXiv 1604.06174): compute again in the backward pass what the forward did not keep."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
        streams: dict[str, Tensor] = {}
        received: deque[Tensor] = deque()  # of this call alone: others may lie between it and its backward pass
        return _first(streams, random, Pass("first", received)), _again(streams, random, Pass("again", received))

    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=random, context_fn=contexts)


@contextmanager
def _first(streams: dict[str, Tensor], random: bool, this: Pass) -> Iterator[None]:
    if random:
        streams.update(_tracker().get_states())
    with _passing(this):
        yield


@contextmanager
def _again(streams: dict[str, Tensor], random: bool, this: Pass) -> Iterator[None]:
    present = _tracker().get_states() if random else {}
    if random:
        _tracker().set_states(streams)
    try:
        with _passing(this):
            yield
    finally:
        if random:
            _tracker().set_states(present)


@contextmanager
def _passing(this: Pass) -> Iterator[None]:
    token = PASS.set(this)
    try:
        yield
    finally:
        PASS.reset(token)


def _tracker() -> Any:
    from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
