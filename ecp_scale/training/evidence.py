"""What a launch leaves for whoever looks for a fault: how far it is, its last messages, what holds its memory."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ecp_scale.cluster.last_words import before_leaving
from ecp_scale.cluster.ranks import Ranks
from ecp_scale.console import say
from ecp_scale.errors import is_first_of_host
from ecp_scale.files import write_text

ALIVE = "alive.json"
"""Of the run folder: how far the run is, for monitors outside of it."""
ALIVE_SECONDS = 5.0
"""Least time between two."""
FLIGHT = "flight_recorder_"
"""Beginning of the names of files that ``torch.distributed.flight_recorder.fr_trace`` reads."""


@contextmanager
def kept_evidence(run: Path) -> Iterator[None]:
    """Write the last messages of this rank if another is lost, and its memory if it has too little of it."""
    with before_leaving(lambda: _dump_messages(run)):
        try:
            yield
        except torch.OutOfMemoryError:
            _dump_memory(run)
            raise


def _dump_messages(run: Path) -> None:
    """What torch's flight recorder knows: the newest collectives, with shapes and whether they have ended."""
    bindings: Any = torch._C._distributed_c10d
    dump = getattr(bindings, "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace", None)
    content = dump() if dump is not None else b""
    if content:
        folder = run / "logs"
        folder.mkdir(exist_ok=True)
        (folder / f"{FLIGHT}{dist.get_rank()}").write_bytes(content)
        if is_first_of_host():
            say(f"evidence    the last messages of the ranks: {folder / FLIGHT}*")


def _dump_memory(run: Path) -> None:
    """What holds the memory of this rank's GPU, for pytorch.org/memory_viz."""
    rank = Ranks.from_environment().rank
    path = run / "profile" / f"out-of-memory-rank-{rank}.pickle"
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        say(f"evidence    what holds the memory of rank {rank}: {path}")


class Alive:
    """Writes ``ALIVE`` every few seconds as steps go by: a run that hangs in one writes none."""

    def __init__(self, run: Path, steps: int) -> None:
        """Args:
        run: its folder.
        steps: of the whole run.
        """
        self._path = run / ALIVE
        self._steps = steps
        self._written = 0.0

    def step(self, record: dict[str, Any]) -> None:
        """Take the record of a step."""
        now = time.monotonic()
        if now - self._written < ALIVE_SECONDS and record["step"] != self._steps:
            return
        self._written = now
        kept = ("time", "step", "tokens", "loss", "step_seconds")
        content = {name: record[name] for name in kept} | {"steps": self._steps}
        with suppress(OSError):  # a disk that is full is said by those whose files matter
            write_text(self._path, json.dumps(content) + "\n")
