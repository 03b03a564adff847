"""A training run from its request to its last checkpoint."""

import socket
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ecp_scale.checkpoint.mirror import held_mirror
from ecp_scale.checkpoint.resuming import check_sight, check_start, find_start
from ecp_scale.checkpoint.saving import Progress, Saves
from ecp_scale.cluster.signals import StopRequest, write_stopped
from ecp_scale.command_line import Request, to_yaml
from ecp_scale.config import Config
from ecp_scale.console import say, waiting
from ecp_scale.data.batches import ReadAhead, StepBatches, TrainingBatches
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.digest import from_parts
from ecp_scale.parallel.device import check_precision, known_peak_teraflops, peak_memory_bytes, set_tf32
from ecp_scale.parallel.groups import Groups, agreed, decided, process_groups
from ecp_scale.parallel.random import seed_step
from ecp_scale.training.agreement import check_same, facts, only_launch
from ecp_scale.training.checkpoints import Checkpoints
from ecp_scale.training.corpora import check_view, loss_mask, open_data
from ecp_scale.training.events import EventLog
from ecp_scale.training.metrics import MetricsFile
from ecp_scale.training.overlap import check_overlap
from ecp_scale.training.probe import probe_loss
from ecp_scale.training.profiling import profiled
from ecp_scale.training.report import StepReport, describe_end, describe_passed, describe_run, describe_start
from ecp_scale.training.starting import check_backend, check_rate, initial_weights, load_weights, write_settings
from ecp_scale.training.step import (
    DivergedError,
    StepResult,
    any_rank,
    garbage_by_hand,
    optimizer_step,
    reporter,
)
from ecp_scale.training.trackers import check_trackers, start_trackers
from ecp_scale.training.validation import validation_numbers
from ecp_scale.zero import json_config
from ecp_scale.zero.averaging import update_average
from ecp_scale.zero.engine import (
    Engine,
    apply_optimizer_config,
    build_engine,
    check_zero_section,
    set_batch,
    set_learning_rate,
)
from ecp_scale.zero.making import check_host_memory


def train(request: Request, stop: StopRequest | None = None) -> None:
    """Run ``request.config`` on the ranks of this launch.

    Args:
        request: what the command line asks for.
        stop: requests to stop, where some may have come already.

    Raises:
        InputError: on all ranks, if they differ, or if data, folders or checkpoint cannot be used.
        DivergedError: if loss or gradients stay non-finite.
        SaveFailedError: if a checkpoint cannot be written, unless the config says to go on.
    """
    check_zero_section(request.deepspeed)
    assert request.config.training.output_dir is not None
    run = Path(request.config.training.output_dir)
    launched = time.time()
    mine = facts(request)
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        groups = stack.enter_context(process_groups(request.config.parallel, lambda: check_same(mine)))
        agreed(lambda: check_precision(groups.device, request.config.training.precision))
        agreed(lambda: check_backend(request.config, groups.device))
        agreed(lambda: check_trackers(request.config))
        stack.enter_context(only_launch(run))
        mirror = Path(request.config.checkpoint.mirror) if request.config.checkpoint.mirror else None
        if mirror is not None:
            decided(lambda: stack.enter_context(held_mirror(mirror, run)))
        start = decided(lambda: find_start(run, request.resume, mirror))
        agreed(lambda: check_sight(run, start))
        if dist.get_rank() == 0:
            stop.watch(run)
        config, blend, validation = decided(lambda: open_data(request.config))
        agreed(lambda: check_view(blend, validation))
        done = start.progress
        config = config.with_length(done.step, done.tokens)
        run_tokens = config.tokens_after(config.training.steps, done.step, done.tokens)
        events = stack.enter_context(EventLog(run if dist.get_rank() == 0 else None, done.step))
        if dist.get_rank() == 0:
            for line in describe_start(start, run):
                say(line)
        decided(lambda: check_start(start, config, blend))
        initial = decided(lambda: initial_weights(request, start, config, blend))
        decided(lambda: check_rate(start, config, run_tokens, request.allow_rate_jump))
        settings = json_config.resolve(request.deepspeed, config, request.world_size)
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        if dist.get_rank() == 0:
            say(describe_run(config, blend, hosts, json_config.zero_stage(settings), run_tokens))
        here = hosts.count(socket.gethostname())
        agreed(lambda: check_host_memory(config, settings, groups, here))
        set_tf32(config.training.tf32)
        agreed(lambda: check_overlap(config, request.deepspeed, groups, request.world_size))
        with waiting("building    the model and its optimizer", dist.get_rank() == 0):
            engine = build_engine(config, settings, groups, draw=start.record is None and initial is None)
        load_weights(engine, config, groups, start, initial)
        apply_optimizer_config(engine, config.optimizer)
        decided(lambda: write_settings(run, to_yaml(config), settings))
        saves = Saves(engine, config, blend, run, run_tokens)
        probe = partial(probe_loss, engine, config, groups)
        checkpoints = Checkpoints(saves, config.checkpoint, run, start.folder, events, probe)
        events.add("started", done.step, ranks=len(hosts), hosts=list(dict.fromkeys(hosts)), launched=launched)
        _Run(config, groups, engine, blend, validation, run, run_tokens, stop, checkpoints, events).steps(
            start.progress
        )
        engine.destroy()


class _Run:
    """The loop and what it holds on to."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        engine: Engine,
        blend: Blend,
        validation: dict[str, Corpus],
        folder: Path,
        run_tokens: int,
        stop: StopRequest,
        checkpoints: Checkpoints,
        events: EventLog,
    ) -> None:
        self.config = config
        self.groups = groups
        self.engine = engine
        self.blend = blend
        self.validation = validation
        self.folder = folder
        self.run_tokens = run_tokens
        self.stop = stop
        self.checkpoints = checkpoints
        self.events = events
        self.is_first = dist.get_rank() == 0
        self.mask = loss_mask(config, [*blend.corpora, *validation.values()])

    def steps(self, done: Progress) -> None:
        """Train from after what is done to the end, or until any rank is asked to stop."""
        config, replicas = self.config, self.groups.replicas
        loss: float | None = None
        reader = TrainingBatches(self.blend, config.training, replicas.size(), replicas.rank())
        readers = config.parallel.tensor * config.parallel.context  # ranks that read the same samples
        skipped_in_a_row, reason = 0, self._reason()
        with ExitStack() as stack:
            record = self._recorder(stack, done.step)
            batches = stack.enter_context(ReadAhead(reader))
            profiled_steps = config.logging.profile_steps if self.is_first else None
            begin_step = stack.enter_context(profiled(self.folder, profiled_steps, self.groups.device))
            collect_garbage = stack.enter_context(garbage_by_hand())
            while reason is None and done.step < config.training.steps:
                began = time.perf_counter()
                begin_step(done.step + 1)
                sequences = config.sequences_after(done.tokens)
                tokens = done.tokens + sequences * config.model.sequence_length
                rate = config.optimizer.learning_rate_at(tokens, self.run_tokens)
                then = (tokens, config.sequences_after(tokens)) if done.step + 1 < config.training.steps else None
                result = self._step(done.step + 1, rate, batches.after(done.tokens, sequences, then), sequences)
                *digests, written, failed = result.sums
                digest = from_parts([total // readers for total in digests])
                done, loss = Progress(done.step + 1, tokens, (done.data_digest + digest) % 2**64), result.loss
                numbers = self._numbers(done, result, rate, time.perf_counter() - began, sequences)
                if self._is_due(done.step, config.training.validation_every_steps):
                    what = (self.validation, config.training, self.groups, self.mask)
                    numbers |= validation_numbers(self.engine, *what)
                record(numbers)
                collect_garbage()
                skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
                self._check_skipped(done.step, skipped_in_a_row, result)
                self.checkpoints.heard(written, failed)
                if result.stop_requested:
                    reason = self._reason()
                if reason is not None or self._is_due(done.step, config.checkpoint.every_steps):
                    self.checkpoints.save(done, is_last=reason is not None or done.step == config.training.steps)
                    # A request that came meanwhile must not wait for another step.
                    reason = reason or self._reason()
            # A request that came while its last step was copied: that checkpoint counts.
            self.checkpoints.finish(is_last=True)
            self._end(done, loss, reason)
            self.checkpoints.settle(reason is None)

    def _recorder(self, stack: ExitStack, first_step: int) -> Any:
        """What takes the numbers of each step, on the first rank."""
        if not self.is_first:
            return lambda numbers: None
        file = stack.enter_context(MetricsFile(self.folder, first_step))
        trackers = start_trackers(self.config, self.folder)
        report = StepReport(self.config, self.folder.name, first_step)
        stack.callback(report.close)

        def finish(kind: Any, error: BaseException | None, traceback: Any) -> None:
            for tracker in trackers:
                tracker.finish(failed=error is not None)

        stack.push(finish)

        def record(numbers: dict[str, Any]) -> None:
            file.write(numbers)
            report.step(numbers)
            for tracker in trackers:
                tracker.log(numbers)

        return record

    def _step(self, step: int, rate: float, batches: StepBatches, sequences: int) -> StepResult:
        set_learning_rate(self.engine, rate)
        seed_step(self.config.training.seed, step, self.groups)
        set_batch(self.engine, sequences * self.config.parallel.context)
        try:
            result = optimizer_step(
                self.engine,
                batches.micro_batches,
                self.groups,
                self.stop.reason is not None,
                self.mask,
                reporter(step, self.groups.device),
                [*batches.digest_parts, *self.checkpoints.news()],
            )
        except DivergedError as error:
            raise self._diverged(step, str(error)) from None
        if self.config.optimizer.average_decay is not None and not result.skipped:
            update_average(self.engine, self.config.optimizer.average_decay, step)
        return result

    def _check_skipped(self, step: int, in_a_row: int, result: StepResult) -> None:
        if result.skipped and self.is_first:
            say(f"step {step:,}  the update was skipped: the gradient norm is {result.gradient_norm}")
        if in_a_row >= self.config.training.max_skipped_steps:
            raise self._diverged(step, f"{in_a_row} updates in a row were skipped because gradients were not finite")

    def _diverged(self, step: int, text: str) -> DivergedError:
        self.checkpoints.finish(has_ended=True)
        return DivergedError(f"step {step}: {text}; last checkpoint: {self.checkpoints.newest or 'none'}")

    def _reason(self) -> str | None:
        """Why the run is to stop, if any rank was asked to; the same on all."""
        if not any_rank(self.stop.reason is not None, self.groups.device):
            return None
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, self.stop.reason)
        return next((reason for reason in reasons if reason is not None), "a request")

    def _end(self, done: Progress, loss: float | None, reason: str | None) -> None:
        if not self.is_first:
            return
        if reason is not None and done.step < self.config.training.steps:
            write_stopped(self.folder, reason, done.step, self.checkpoints.newest)
            self.events.add("stopped", done.step, reason=reason)
            say(describe_end(self.folder, done, loss, reason, self.checkpoints.newest))
        elif (passed := describe_passed(self.config, done)) is not None:
            say(passed)
        else:
            self.events.add("finished", done.step)
            say(describe_end(self.folder, done, loss, None, self.checkpoints.newest))

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.training.steps

    def _numbers(
        self, done: Progress, result: StepResult, rate: float, seconds: float, sequences: int
    ) -> dict[str, Any]:
        config = self.config
        speed = sequences * config.model.sequence_length / seconds
        peak = config.logging.peak_teraflops or known_peak_teraflops(self.groups.device, config.training.precision)
        utilisation = None
        if peak is not None:
            utilisation = speed * config.model.flops_per_token / (peak * 1e12 * dist.get_world_size())
        return {
            "step": done.step,
            "time": time.time(),
            "tokens": done.tokens,
            "loss": result.loss,
            "grad_norm": result.gradient_norm,
            "lr": rate,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": utilisation,
            "peak_memory_bytes": peak_memory_bytes(self.groups.device),
            "skipped_steps": self.engine.skipped_steps,
            "data_digest": f"{done.data_digest:016x}",
        }
