"""Random state as arithmetic: dropout is a function of (seed, step, rank), so no generator is ever saved.

Two streams, as in Megatron: torch's default generator draws the same on all ranks of a tensor-parallel group, the
tensor-parallel stream differs between them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ecp_scale.parallel.groups import Groups


class RandomStream:
    """A second stream of random numbers on the current device; ``state`` is that of torch's generator."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def seed(self, seed: int) -> None:
        """Start the stream anew; torch's default generator stays where it is."""
        present = _state()
        _seed(seed)
        self.state = _state()
        _set_state(present)

    @contextmanager
    def drawing(self, ranks: int) -> Iterator[None]:
        """Let torch draw from this stream, which moves on.

        Args:
            ranks: of the tensor-parallel group. A single one may draw from torch's default generator instead, where
                nothing has seeded the stream.
        """
        if self.state is None:
            assert ranks == 1, "seed_step comes before the first number"
            yield
            return
        present = _state()
        _set_state(self.state)
        try:
            yield
        finally:
            self.state = _state()
            _set_state(present)


TENSOR_PARALLEL = RandomStream()
"""The stream that differs between the ranks of a tensor-parallel group."""


def seed_step(seed: int, step: int, groups: Groups) -> None:
    """Start both streams of one optimizer step; a resumed run draws what the uninterrupted one draws."""
    replica = (seed * 1_000_003 + step) * 65_536 + groups.data_rank
    _seed(_mix(replica))
    TENSOR_PARALLEL.seed(_mix(replica * 65_536 + groups.tensor_rank + 1))


def _seed(seed: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _state() -> Tensor:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def _set_state(state: Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _mix(value: int) -> int:
    """Spread consecutive integers over 63 bits (the finaliser of SplitMix64)."""
    value &= 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1
