"""What a launch of thousands of ranks costs before and beside its training: python -m benchmarks.control_plane.

Ranks are threads of a few processes, eight to a pretended host, on a store of the kind that a launch has: they meet,
agree that none shares a GPU, send heartbeats that the first one reads, and hear of one that is lost. Then digests are
added up as at a save. Tells the seconds until the last rank is done, and the calls of the store that a rank makes.
Writes a table to OUTPUT. What it cannot show: a network, ranks that compute meanwhile, and collectives.
"""

import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.options import count
from benchmarks.timing import environment
from ecp_scale.cluster.heartbeat import HEARTBEAT_SECONDS, FailureDetector
from ecp_scale.cluster.ranks import Process, Ranks
from ecp_scale.cluster.rendezvous import _check_one_rank_per_gpu
from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.parallel.digests import summed

RANKS_OF_HOST = 8
PROCESSES = 4
TIMEOUT_SECONDS = 300
STACK_BYTES = 1 << 19
STAGES = ("meet", "agree on GPUs", "heartbeat", "hear of a loss")
MESSAGES = ("set", "get", "add", "append", "wait", "check", "multi_get", "multi_set", "compare_set")
PARAMETERS, PARTS = 300, 3
"""Of the model whose save is recorded, and of those how many a rank holds parts of."""


COUNTED: Counter[str] = Counter()


def count_messages() -> None:
    """Count what this process asks of stores from now on."""
    for store in (dist.PrefixStore, dist.TCPStore):
        for name in MESSAGES:
            if hasattr(store, name):
                setattr(store, name, _counting(getattr(store, name), name))


def _counting(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(method)
    def counted(*arguments: Any) -> Any:
        COUNTED[name] += 1
        return method(*arguments)

    return counted


class Rank(FailureDetector):
    """One that looks for failures when it is asked to: threads that look by themselves want a host."""

    def _watch(self) -> None:
        pass

    def _watch_the_store(self) -> None:
        pass


class Crowd:
    """Some ranks of the launch as threads, which pass the stages together with those of other processes."""

    def __init__(self, ranks: range, size: int, pipe: Connection) -> None:
        self.ranks, self.size, self.pipe = ranks, size, pipe
        self.here = threading.Barrier(len(ranks) + 1)
        self.failures: list[BaseException] = []
        self.kept: list[FailureDetector] = []

    def run(self) -> None:
        """Pass the stages as the other end of the pipe says, and tell the seconds and messages of each."""
        threading.stack_size(STACK_BYTES)
        count_messages()
        # Whether processes of a host live is asked of that host's own kernel, which here would be asked for all hosts.
        Process.is_seen = lambda self: True  # type: ignore[method-assign]
        for rank in self.ranks:
            threading.Thread(target=self._try, args=(rank,), daemon=True).start()
        self.pipe.send("ready")  # Python and torch have been loaded
        for _ in ("connect", *STAGES):
            self.pipe.recv()
            COUNTED.clear()
            with suppress(threading.BrokenBarrierError):
                self.here.wait()
                self.here.wait()
            self.pipe.send((time.monotonic(), sum(COUNTED.values()), self.failures[:1]))
        self.pipe.recv()

    def _try(self, rank: int) -> None:
        try:
            self._rank(rank)
        except threading.BrokenBarrierError:
            pass  # another rank's failure
        except BaseException as error:
            self.failures.append(error)
            self.here.abort()

    def _rank(self, rank: int) -> None:
        place = Ranks(rank, rank % RANKS_OF_HOST, self.size)
        process = Process.this()
        self.here.wait()
        detector = Rank(place, TIMEOUT_SECONDS, Process(f"host{rank // RANKS_OF_HOST}", process.pid, process.started))
        self.kept.append(detector)  # the first one's serves the store
        self._pass()
        detector.wait_for_all()
        self._pass()
        _check_one_rank_per_gpu(detector.meeting, f"GPU-{rank}", TIMEOUT_SECONDS)
        self._pass()
        heartbeats: dict[int, tuple[str, float]] = {}
        assert detector._look(heartbeats) is None
        self._pass()
        if rank == self.size - 1:
            detector._announce("lost")
        while detector._look(heartbeats) != "lost":
            time.sleep(HEARTBEAT_SECONDS)
        self.here.wait()

    def _pass(self) -> None:
        self.here.wait()
        self.here.wait()


def crowd(ranks: range, size: int, port: int, pipe: Connection) -> None:
    """A process of some ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    Crowd(ranks, size, pipe).run()


def simulate(size: int) -> dict[str, dict[str, float]]:
    """Seconds and messages per rank of every stage for so many ranks."""
    port, context = 20_000 + os.getpid() % 12_000, multiprocessing.get_context("spawn")
    share = -(-size // PROCESSES)
    pipes, processes = [], []
    for first in range(0, size, share):
        ours, theirs = context.Pipe()
        ranks = range(first, min(size, first + share))
        processes.append(context.Process(target=crowd, args=(ranks, size, port, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    found = {}
    for stage in ("connect", *STAGES):
        began = time.monotonic()
        for pipe in pipes:
            pipe.send(stage)
        told = [pipe.recv() for pipe in pipes]
        failures = [failure for _, _, some in told for failure in some]
        if failures:
            for process in processes:
                process.kill()
            raise failures[0]
        seconds = max(ended for ended, _, _ in told) - began
        found[stage] = {"seconds": seconds, "messages_per_rank": sum(sent for _, sent, _ in told) / size}
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join()
    found["sum the digests of a save"] = {"seconds": digest_seconds(size), "messages_per_rank": 0.0}
    return found


def digest_seconds(size: int) -> float:
    """Seconds in which the first rank adds up the digests of a save that all ranks report, of ZeRO-1 and -2."""
    names = [f"layers.{number}.weight" for number in range(PARAMETERS)]
    parts = [{names[(rank + other) % PARAMETERS]: rank * other for other in range(PARTS)} for rank in range(size)]
    began = time.perf_counter()
    json.dumps(summed(names, parts))
    return time.perf_counter() - began


@input_errors_exit()
def main() -> None:
    """Simulate and write."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--ranks", type=count, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/control_plane"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    found = {size: simulate(size) for size in options.ranks}
    lines = ["| | " + " | ".join(f"{size:,} ranks" for size in found) + " |", "|---|" + "---:|" * len(found)]
    for stage in next(iter(found.values())):
        cells = [f"{one[stage]['seconds']:.2f} s, {one[stage]['messages_per_rank']:.1f}" for one in found.values()]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    machine = environment()
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    text = f"Seconds until the last rank is done, and messages of a rank; {where}\n\n" + "\n".join(lines) + "\n"
    (options.output / "control_plane.md").write_text(text)
    (options.output / "control_plane.json").write_text(
        json.dumps({"environment": machine, "ranks": found}, indent=1) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
