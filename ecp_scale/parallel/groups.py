"""Process groups: who shares a matrix, who holds a replica, and how ranks agree on an error."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ecp_scale.cluster.ranks import Ranks
from ecp_scale.cluster.rendezvous import rendezvous
from ecp_scale.config import ParallelConfig
from ecp_scale.console import say
from ecp_scale.errors import AgreedError, InputError
from ecp_scale.parallel.device import backend, gpu_identity, keep_kernels_in_order, local_device
from ecp_scale.parallel.megatron import parallel_state

T = TypeVar("T")
TOUCH_SECONDS = 5.0
"""Longest time between two messages of ranks that do something long."""


@dataclass(frozen=True)
class Groups:
    """The groups that models and training take as arguments."""

    tensor: ProcessGroup
    """Ranks that split every matrix."""
    context: ProcessGroup
    """Ranks that hold one run of segments each of the same sequences."""
    replicas: ProcessGroup
    """Ranks that read other sequences."""
    data: ProcessGroup
    """Ranks that hold the same parameters, replicas and context together: ZeRO and the mean of gradients go over it."""
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        """This rank's share of every matrix."""
        return self.tensor.rank()

    @property
    def data_rank(self) -> int:
        """This rank's place among those that hold the same parameters."""
        return self.data.rank()


@contextmanager
def process_groups(
    config: ParallelConfig, joined: Callable[[], None] = lambda: None, device: torch.device | None = None
) -> Iterator[Groups]:
    """Join the launch, build Megatron's groups, and leave both in order.

    One program, whatever the number of ranks: see ``rendezvous``. Where torch.distributed is up already, its world
    is used and left as it is.

    Args:
        config: how ranks share the work.
        joined: called when all ranks have come, before any group is made, such as to compare their configs.
        device: of this rank; None takes its GPU if there is one.

    Raises:
        InputError: if this rank's GPU cannot be used, or another rank's is the same.
        LostRankError: on the ranks that are there, if another does not come or is lost.
    """
    ranks = Ranks.from_environment()
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed insists on it
    on_gpu_of_its_own = device is None and torch.cuda.is_available()
    hindered = keep_kernels_in_order() if config.tensor > 1 and on_gpu_of_its_own else None
    device = device or local_device(ranks.local_rank)
    if hindered and ranks.rank == 0:
        say(f"{'messages':12}{hindered}")
    on_gpu = device if device.type == "cuda" else None
    with ExitStack() as stack:
        if dist.is_initialized():
            stack.callback(_end_groups)
        else:
            stack.enter_context(rendezvous(backend(device), config.timeout_seconds, gpu_identity(device), on_gpu))
            stack.callback(parallel_state.destroy_model_parallel)
        joined()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            context_parallel_size=config.context,
            distributed_timeout_minutes=config.timeout_seconds / 60,  # a float is as good
            create_gloo_process_groups=False,  # only Megatron's own checkpoints use them
        )
        yield Groups(
            tensor=parallel_state.get_tensor_model_parallel_group(),
            context=parallel_state.get_context_parallel_group(),
            replicas=parallel_state.get_data_parallel_group(),
            data=parallel_state.get_data_parallel_group(with_context_parallel=True),
            device=device,
        )


def _end_groups() -> None:
    # Trap: Megatron-core forgets its groups, whose threads then run on beside those of the next ones.
    groups = parallel_state._global_process_group_list
    parallel_state.destroy_model_parallel()
    for group in groups or []:
        if group is not None:
            dist.destroy_process_group(group)


def decided(action: Callable[[], T]) -> T:
    """Run ``action`` on the first rank alone, and return its result, a plain value, on all.

    For what all ranks must act on alike, and may not see alike: another host may see an older state of a folder.

    Raises:
        AgreedError: everywhere, if the first rank raised an ``InputError``, or an ``OSError`` that names a file.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        box = [*_attempt(action)]
    dist.broadcast_object_list(box)
    result, error = box
    if error is not None:
        raise AgreedError(error)
    return result


def decided_slowly(action: Callable[[], T]) -> T:
    """``decided`` for what takes longer than a message may."""
    result = agreed(lambda: action() if dist.get_rank() == 0 else None, takes_long=True)
    return decided(lambda: result)  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """What every rank has, in their order, on the first one; nothing on the others, or every rank would hold all."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found)
    return found or []


def everyone(value: T) -> list[T]:
    """What every rank has, in their order, on all of them: for what is small."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _keep_in_touch(action: Callable[[], T]) -> T:
    """Run ``action`` in a thread, and tell the other ranks again and again whether it is done, until all are."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        done = [False]
        while not all(done):
            wait([future], timeout=TOUCH_SECONDS)
            done = everyone(future.done())
        return future.result()


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result, or why it was refused."""
    try:
        return action(), None
    except InputError as refused:
        return None, str(refused)
    except OSError as error:
        if error.filename is None:
            raise
        return None, f"{error.filename}: {error.strerror or error}"


def agreed(action: Callable[[], T], takes_long: bool = False) -> T:
    """Run ``action`` on every rank, each for itself; where it is refused on any, raise on all, naming the ranks.

    A rank that leaves alone would keep the others waiting until their timeout.

    Args:
        action: without messages between ranks.
        takes_long: ranks may be further apart than the timeout of a message, as when some read from a slow disk.

    Raises:
        AgreedError: everywhere, if any rank raised an ``InputError``, or an ``OSError`` that names a file.
    """
    result, error = _keep_in_touch(lambda: _attempt(action)) if takes_long else _attempt(action)
    errors = everyone(error)
    messages = {text: [rank for rank, other in enumerate(errors) if other == text] for text in errors if text}
    if messages:
        everywhere = len(messages) == 1 and None not in errors
        lines = [text if everywhere else f"rank {', '.join(map(str, at))}: {text}" for text, at in messages.items()]
        raise AgreedError("\n".join(lines))
    return result  # type: ignore[return-value]
