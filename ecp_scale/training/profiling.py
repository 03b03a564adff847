"""What some steps of the first rank spend time and memory on, as files that the tools of torch read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ecp_scale.console import say

FOLDER = "profile"


@contextmanager
def profiled(run: Path, steps: tuple[int, int] | None, device: torch.device) -> Iterator[Callable[[int], None]]:
    """Profile from the beginning of the first to the end of the last of ``steps``.

    Args:
        run: the run folder; RUN/profile gets a trace for chrome://tracing or Perfetto and, on a GPU, a snapshot of its
            memory for pytorch.org/memory_viz.
        steps: first and last; None profiles nothing.
        device: of this rank.

    Yields:
        What is to be called at the beginning of each step.
    """
    if steps is None:
        yield lambda step: None
        return
    first, last = steps
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities, record_shapes=True)
    begun = running = False

    def end() -> None:
        nonlocal running
        if not running:
            return
        running = False
        profiler.stop()
        trace = run / FOLDER / f"steps-{first}-{last}.json"
        try:
            trace.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            if on_gpu:
                torch.cuda.memory._dump_snapshot(str(trace.with_suffix(".pickle")))
            say(f"profile     {trace}")
        except OSError as error:  # of no use to a run that would go on
            say(f"profile     {trace} is not written: {error.strerror or error}")
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)

    def begin(step: int) -> None:
        nonlocal begun, running
        if first <= step <= last and not running:  # a run may be resumed in between
            begun = running = True
            if on_gpu:
                torch.cuda.memory._record_memory_history()
            profiler.start()
        elif step > last:
            end()

    try:
        yield begin
    finally:
        end()
        if not begun:
            say(f"profile     none: logging.profile_steps is [{first}, {last}], and no such step was done")


@contextmanager
def named(what: str) -> Iterator[None]:
    """A range of a step in a profile, for torch's and, on a GPU, for Nsight Systems."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.nvtx.range_push(what)
    try:
        with record_function(what):
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()
