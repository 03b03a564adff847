"""One optimizer step: accumulation, one message about loss and stop requests, and the checks before and after."""

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ecp_scale.cluster.progress import COMPUTES, HAS_FINISHED, WAITS, report_progress
from ecp_scale.data.marks import NO_MASK, LossMask, plain
from ecp_scale.parallel.device import Stopwatch, done_so_far, to_device
from ecp_scale.parallel.groups import Groups
from ecp_scale.training.profiling import named
from ecp_scale.zero.engine import Engine, plain_gradient_norm

GARBAGE_STEPS = 100
"""Steps between two collections of garbage."""


class DivergedError(RuntimeError):
    """The run produced numbers from which no further step recovers."""


@dataclass(frozen=True)
class StepResult:
    """What one step reports: the mean loss of its tokens in nats, the gradient norm, and whether it was applied."""

    loss: float
    gradient_norm: float
    skipped: bool
    stop_requested: bool
    sums: tuple[int, ...] = ()
    """Sums over all ranks of the whole numbers that each has added to the message."""
    skipped_steps: int = 0
    """Of the run so far: updates that were not applied."""
    forward_seconds: float = 0.0
    """That this rank's device took for its forward passes."""
    wait_seconds: float = 0.0
    """That it took for the message about the loss, in which it waits for ranks that are behind."""


def optimizer_step(
    engine: Engine,
    micro_batches: Sequence[Tensor],
    groups: Groups,
    mask: LossMask = NO_MASK,
    report: Callable[[int, str], None] = lambda part, what: None,
    to_sum: Sequence[int] = (),
    stop_requested: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Accumulate over the micro-batches (micro, n + 1), which lie on the host, and update the weights.

    The loss is the mean over all targets of the step, on all ranks, that have one by ``mask``. Ranks and micro-batches
    may differ in how many they have, and DeepSpeed takes the mean over both; so each sum is scaled to what makes that
    mean the right one. ``report`` is told which part of the step is done, before ranks wait for each other. ``to_sum``
    are whole numbers below 2^53 in sum, which the message about the loss takes along, as it does a stop request.

    Raises:
        DivergedError: on all ranks, before the update where the loss is not finite; after it where ZeRO finds the
            gradients not finite and has not skipped the update.
    """
    losses = []
    forward, message = Stopwatch(groups.device), Stopwatch(groups.device)
    report(0, COMPUTES)
    targets = [engine.module.trained_targets(ids[:, 1:]) for ids in micro_batches]
    trained = [mask.of(some) if mask else None for some in targets]
    count = sum(some.numel() for some in targets) * groups.data.size()
    if mask:
        mine = sum(int(some.sum()) for some in trained if some is not None)
        (count,) = sum_over([mine], groups.data, groups.device)
    scale = len(micro_batches) * groups.data.size() / max(1, count)
    for number, (batch, some) in enumerate(zip(micro_batches, trained, strict=True), start=1):
        on_host = plain(batch) if mask.marks else batch
        ids = to_device(on_host, groups.device)
        counted = None if some is None else to_device(some, groups.device)
        with named("forward"), forward.running():
            total, each = engine(ids[:, :-1], ids[:, 1:], counted, on_host=on_host[:, :-1])
        report(number, f"has done forward pass {number} of")
        loss = total * scale
        if engine.module.output.z_loss:  # what is reported compares with runs that have none
            total = (each if counted is None else each.masked_fill(~counted, 0)).sum()
        losses.append((total.detach() * scale).float())
        with named("backward"):
            engine.backward(loss)
        if number < len(micro_batches):
            engine.step()

    report(len(micro_batches) + 1, WAITS)
    loss_value, stops, sums = _shared(losses, stop_requested(), to_sum, groups.device, message)
    if not math.isfinite(loss_value):
        raise DivergedError(f"the loss is {loss_value}; the weights have not been updated with it")

    gradient_norm = plain_gradient_norm(engine, groups)
    if gradient_norm is not None and not math.isfinite(gradient_norm):
        raise DivergedError(f"the gradient norm is {gradient_norm}; the weights have not been updated with it")
    skipped_before = engine.skipped_steps
    with named("update"):
        engine.step()
    skipped = engine.skipped_steps > skipped_before
    if gradient_norm is None:
        gradient_norm = float(engine.get_global_grad_norm())
        if not math.isfinite(gradient_norm) and not skipped:
            raise DivergedError(f"the gradient norm is {gradient_norm} and the weights have been updated with it")
    report(len(micro_batches) + 2, HAS_FINISHED)
    times = forward.seconds, message.seconds
    return StepResult(loss_value, gradient_norm, skipped, stops, sums, engine.skipped_steps, *times)


def _shared(
    losses: list[Tensor], stop_requested: bool, to_sum: Sequence[int], device: torch.device, message: Stopwatch
) -> tuple[float, bool, tuple[int, ...]]:
    """One message for all: the mean loss, whether any rank was asked to stop, and sums of whole numbers.

    Ranks of one tensor group hold the same loss, those of a context group the losses of their runs, so the mean over
    all ranks is that of all.
    """
    told = to_device(torch.tensor([0.0, float(stop_requested), *to_sum], dtype=torch.float64), device)
    told[0] = torch.stack(losses).double().mean()
    with message.running():
        dist.all_reduce(told)
    loss_sum, stops, *sums = told.tolist()  # where the host waits for the device
    return loss_sum / dist.get_world_size(), stops > 0, tuple(map(int, sums))


def reporter(step: int, device: torch.device) -> Callable[[int, str], None]:
    """What tells with this rank's heartbeat how far it is in a step, once its device is so far, too."""
    return lambda part, what: report_progress(step, part, what, done_so_far(device))


def sum_over(numbers: list[int], group: ProcessGroup, device: torch.device) -> list[int]:
    """Sums of integers over the ranks of a group."""
    shared = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(shared, group=group)
    return shared.tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank of the launch."""
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


@contextmanager
def garbage_by_hand() -> Iterator[Callable[[], object]]:
    """Collect garbage at every so many calls of what is returned alone: else ranks stop one after another, and wait."""
    gc.collect()
    gc.freeze()
    gc.disable()
    steps = itertools.count(1)
    try:
        yield lambda: gc.collect() if next(steps) % GARBAGE_STEPS == 0 else None
    finally:
        gc.enable()
        gc.unfreeze()
