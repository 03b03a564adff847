"""What several launches on one machine must not share: a port, and a GPU."""

import os
import socket
import threading


def free_port() -> int:
    """A port for the rendezvous of one of several launches on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def gpu_of_thread(ranks: int, jobs: int) -> dict[str, str]:
    """The environment of a launch that a thread of a pool makes, beside those of other threads: a GPU of its own.

    Args:
        ranks: of the launch; one of several takes GPUs as any launch does.
        jobs: threads of the pool.
    """
    name = threading.current_thread().name.rpartition("_")[2]  # a pool numbers its threads
    if ranks > 1 or jobs == 1 or not name.isdecimal():
        return {}
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return {}
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[int(name) % len(gpus)]}
