"""How the benchmarks measure: alternating rounds, medians, memory by torch's own allocations."""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

from ecp_scale.precision import product_type

KEPT = ", freed memory kept"
"""What a peer's name ends with where its process allocates as ours do."""
Contender: TypeAlias = Callable[[], AbstractContextManager[Callable[[], object]]]
"""Builds what is measured, gives the call to measure, and clears up."""


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every round runs all of them, so that a slow spell hits them alike.

    One call of each before the first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            synchronise()
            began = time.perf_counter()
            run()
            synchronise()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


class Worker:
    """A contender in a process of its own, as its users run it: what others do to memory does not touch it."""

    def __init__(self, contender: Contender) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(contender, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self) -> None:
        """One call."""
        self._ask("run")

    def peak_bytes(self) -> int:
        """``peak_bytes`` of one call."""
        return self._ask("memory")

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()

    def end(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(contender: Contender, pipe: Connection) -> None:
    with contender() as run:
        while True:
            try:
                asked = pipe.recv()
            except EOFError:
                return
            if asked == "run":
                run()
                synchronise()
            pipe.send(peak_bytes(run) if asked == "memory" else None)


def side_by_side(contenders: Mapping[str, Contender], rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each contender in each round, and its peak bytes; each runs in a process of its own."""
    with workers(contenders) as started:
        seconds = alternate({name: worker.run for name, worker in started.items()}, rounds)
        return seconds, {name: worker.peak_bytes() for name, worker in started.items()}


@contextmanager
def workers(contenders: Mapping[str, Contender]) -> Iterator[dict[str, Worker]]:
    """A process for each contender."""
    started = {name: Worker(contender) for name, contender in contenders.items()}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.end()


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each contender's rounds."""
    return {name: statistics.median(rounds) for name, rounds in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], peer: str, ours: str) -> float:
    """How many times as fast as a peer we are: the median over rounds of what the two took in the same round."""
    return statistics.median(theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours], strict=True))


def device() -> torch.device:
    """Where contenders run: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory alive at once of what ``run`` allocates, beside what is there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def matrix_product(dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A square matrix product, against which utilisation is counted, and its FLOPs.

    That of bf16 is one of fp32 where the processor has no instructions for it, since torch's own is hundreds of times
    slower.
    """
    size = 8192 if torch.cuda.is_available() else 2048
    wide = product_type(torch.empty(0, dtype=dtype, device=device()))
    a, b = (torch.randn(size, size, device=device()).to(wide) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    # Processors of one name differ in them, and in bf16 by a factor of two or more.
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"device": name, "instructions": instructions, "threads": torch.get_num_threads(), **versions}


def _processor() -> str:
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
