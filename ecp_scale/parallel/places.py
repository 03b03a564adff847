"""Where ranks run: this process's place in the launch, processes on this host, hosts of the others."""

import base64
import json
import os
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Ranks:
    """This process's place in the launch, from the environment that every launcher sets."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        """RANK, LOCAL_RANK and WORLD_SIZE; without a launcher, the only rank."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "001", strict=True)))


@dataclass(frozen=True)
class Process:
    """Where a rank runs."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> "Process":
        """The process that asks."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_seen(self) -> bool:
        """Whether it is alive, as far as this host can see."""
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 1
        except psutil.Error:
            return False


def expected_hosts(came: dict[int, str]) -> dict[int, str]:
    """Host of every rank as far as it is known: where a rank of the same host has come, or as the launcher was told."""
    launcher = psutil.Process().parent()
    words = launcher.cmdline() if launcher is not None else []
    # DeepSpeed's launcher, the parent of every rank, holds {host: devices}.
    told = next((word.partition("=")[2] for word in words if word.startswith("--world_info=")), None)
    if told is not None:
        blocks = [(host, len(devices)) for host, devices in json.loads(base64.urlsafe_b64decode(told)).items()]
    else:
        size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        unknown = "not known" if nodes is None else f"one of {nodes}"
        blocks = [(unknown, size)] * -(-int(os.environ["WORLD_SIZE"]) // size)
    hosts: dict[int, str] = {}
    for name, size in blocks:
        ranks = range(len(hosts), len(hosts) + size)
        host = next((came[rank] for rank in ranks if rank in came), name)
        hosts |= dict.fromkeys(ranks, host)
    return hosts
