"""Where ranks run: this process's place in the launch, processes on this host, hosts of the others."""

import base64
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from ecp_scale.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process's place in the launch, from the environment that every launcher sets."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        """RANK, LOCAL_RANK and WORLD_SIZE; without a launcher, the only rank.

        Raises:
            InputError: naming a variable that is no number, or too large or small.
        """
        defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        found = {name: os.environ.get(name, default) for name, default in defaults.items()}
        for name, text in found.items():
            if not (text.isascii() and text.isdecimal()):
                raise InputError(f"the environment says {name}={text!r}, expected a number that a launcher sets")
        ranks = cls(*map(int, found.values()))
        if not max(ranks.rank, ranks.local_rank) < ranks.world_size:
            raise InputError(f"the environment says {found}, expected ranks below WORLD_SIZE")
        return ranks


def on_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launch is known to be of this host alone, as torchrun, DeepSpeed's launcher and srun tell."""
    size = environment.get("WORLD_SIZE", "1")
    of_host = [environment.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")]
    return size in ("1", *of_host) or (*of_host, environment.get("SLURM_STEP_NUM_NODES")) == (None, None, "1")


@dataclass(frozen=True)
class Process:
    """Where a rank runs."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> "Process":
        """The process that asks."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> "Process":
        """A process of this host.

        Raises:
            psutil.Error: if there is none.
        """
        return cls(socket.gethostname(), pid, _started(pid))

    def is_seen(self) -> bool:
        """Whether it is alive, as far as this host can see."""
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and _started(self.pid) == self.started
        except psutil.Error:
            return False


def _started(pid: int) -> float:
    """When a process was started; on Linux in ticks since boot, since psutil's time moves when the clock is set."""
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return psutil.Process(pid).create_time()


def adopt_launcher() -> None:
    """Check what a launcher has set; under ``srun`` with several tasks and without another one, let each be a rank.

    Sets the variables that torchrun would: the first host of the step serves the store, at a port of the job's own.

    Raises:
        InputError: naming the variable that the launcher or ``srun`` should have set.
    """
    # Trap: a batch script has SLURM_PROCID and SLURM_NTASKS too; only a step of srun has this one.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or tasks == "1":
        Ranks.from_environment()
        lacking = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if "RANK" in os.environ and lacking:
            raise InputError(
                f"the environment has RANK but not {', '.join(lacking)}; expected all that a launcher sets"
            )
        port = os.environ.get("MASTER_PORT", "1")
        if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
            raise InputError(f"the environment says MASTER_PORT={port!r}, expected a number below 65536")
        if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']} but not RANK")
        return
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f"srun has started {tasks} tasks, but {', '.join(missing)} is not set; expected a rank per task"
        )
    rank, local_rank, nodes, job = (os.environ[name] for name in names)
    if not job.isdecimal():
        raise InputError(f"the environment says SLURM_JOB_ID={job!r}, expected a number")
    os.environ |= {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": tasks}
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(20000 + int(job) % 12000))
    Ranks.from_environment()


def first_host(nodes: str) -> str:
    """The first of a Slurm list of hosts, such as ``node[003-010,12],login1``."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


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
