"""The default process group of a launch."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ecp_scale.cluster.heartbeat import FailureDetector
from ecp_scale.cluster.meeting import Meeting
from ecp_scale.cluster.ranks import Ranks
from ecp_scale.errors import AgreedError


def _check_one_rank_per_gpu(meeting: Meeting, gpu: str, seconds: int) -> None:
    """Refuse ranks that share a GPU; all ranks take part, each with what tells its GPU from others.

    Raises:
        AgreedError: on all ranks, naming those that share.
    """

    def shared(gpus: list[str]) -> str:
        users: dict[str, list[int]] = {}
        for rank, other in enumerate(gpus):
            users.setdefault(other, []).append(rank)
        return "\n".join(
            f"  - {', '.join(map(meeting.name, ranks))}: {other}"
            for other, ranks in users.items()
            if other and len(ranks) > 1
        )

    lines = meeting.decided("gpu", gpu, shared, seconds)
    if lines:
        raise AgreedError(f"ranks share a GPU, expected one each:\n{lines}")


@contextmanager
def rendezvous(
    backend: str,
    timeout_seconds: int,
    gpu: str = "",
    device: torch.device | None = None,
    met: Callable[[Meeting], None] = lambda meeting: None,
) -> Iterator[None]:
    """The default process group of the launch: all ranks come, are watched, and leave together.

    Without a launcher it is a group of one on a store in memory.

    Args:
        backend: of torch.distributed.
        timeout_seconds: how long a rank is waited for.
        gpu: what tells this rank's GPU from every other one; empty on a CPU.
        device: that GPU, which NCCL then connects at once, and for which it knows where a barrier waits.
        met: called when all ranks have come, before they connect to each other.

    Raises:
        AgreedError: on all ranks, if several have one GPU, which NCCL refuses in a message of its own.
        LostRankError: on the ranks that are there, if another does not come or is lost.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
        return
    ranks = Ranks.from_environment()
    detector = FailureDetector(ranks, timeout_seconds)
    try:
        detector.wait_for_all()
        with detector.watched():
            met(detector.meeting)
            _check_one_rank_per_gpu(detector.meeting, gpu, timeout_seconds)
            dist.init_process_group(
                backend,
                timeout=timeout,
                store=detector.store,
                rank=ranks.rank,
                world_size=ranks.world_size,
                device_id=device,
            )
            yield
        dist.barrier()  # whoever goes is not missed any more
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        detector.end()
