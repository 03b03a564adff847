"""Random state as arithmetic: dropout is a function of (seed, step, rank), so no generator is ever saved.

Two streams, as in Megatron: the default one is equal on all ranks that share a matrix, the forked one differs.
DeepSpeed tracks them, and is imported only when there is something to draw: evaluation starts without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ecp_scale.parallel.groups import Groups

_TENSOR_PARALLEL_STREAM = "model-parallel-rng"


def seed_step(seed: int, step: int, groups: Groups) -> None:
    """Start both streams of one optimizer step; a resumed run draws what the uninterrupted one draws."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

    replica = (seed * 1_000_003 + step) * 65_536 + groups.data_rank
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    get_accelerator().manual_seed(_mix(replica))
    tracker.add(_TENSOR_PARALLEL_STREAM, _mix(replica * 65_536 + groups.tensor_rank + 1))


@contextmanager
def tensor_parallel_random() -> Iterator[None]:
    """Draw from the stream that differs between the ranks of a tensor group (dropout on sharded activations)."""
    from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork(_TENSOR_PARALLEL_STREAM):
        yield


def _mix(value: int) -> int:
    """Spread consecutive integers over 63 bits (the finaliser of SplitMix64)."""
    value &= 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1
