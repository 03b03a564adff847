"""A training run from its request to its last checkpoint."""

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ecp_scale.checkpoint.mirror import held_mirror
from ecp_scale.checkpoint.resuming import check_sight, check_start, find_start, leave_behind, with_ranges
from ecp_scale.checkpoint.saving import Progress, Saves
from ecp_scale.cluster.signals import StopRequest, write_stopped
from ecp_scale.command_line import Request, to_yaml
from ecp_scale.config import Config
from ecp_scale.console import say, waiting
from ecp_scale.data.batches import ReadAhead, TrainingBatches
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.parallel.device import set_tf32
from ecp_scale.parallel.groups import Groups, agreed, decided, everyone, process_groups
from ecp_scale.parallel.random import seed_step
from ecp_scale.training.agreement import check_same, facts, only_launch
from ecp_scale.training.checkpoints import Checkpoints
from ecp_scale.training.corpora import check_view, loss_mask, open_data
from ecp_scale.training.events import EventLog
from ecp_scale.training.evidence import kept_evidence
from ecp_scale.training.overlap import check_overlap
from ecp_scale.training.probe import probe_loss
from ecp_scale.training.profiling import profiled
from ecp_scale.training.rank_times import RankTimes, SlowRanks, summary
from ecp_scale.training.recorder import Recorder, step_numbers
from ecp_scale.training.report import describe_end, describe_passed, describe_run, describe_start
from ecp_scale.training.rolling_back import Spikes
from ecp_scale.training.starting import check_device, check_rate, initial_weights, load_weights, write_settings
from ecp_scale.training.step import (
    DivergedError,
    StepResult,
    any_rank,
    garbage_by_hand,
    optimizer_step,
    reporter,
)
from ecp_scale.training.step_news import StepNews, to_numbers
from ecp_scale.training.trackers import check_trackers
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
        stack.enter_context(kept_evidence(run))  # outside of the groups, whose end finds out who is lost
        groups = stack.enter_context(process_groups(request.config.parallel, lambda: check_same(mine)))
        agreed(lambda: check_device(request.config, groups.device))
        agreed(lambda: check_trackers(request.config))
        stack.enter_context(only_launch(run))
        mirror = Path(request.config.checkpoint.mirror) if request.config.checkpoint.mirror else None
        if mirror is not None:
            decided(lambda: stack.enter_context(held_mirror(mirror, run)))
        start = decided(lambda: find_start(run, request.resume, request.config))
        agreed(lambda: check_sight(run, start))
        if dist.get_rank() == 0:
            stop.watch(run)
        config, blend, validation = decided(lambda: open_data(with_ranges(request.config, start.skip_samples)))
        agreed(lambda: check_view(blend, validation))
        done = start.progress
        config = config.with_length(done.step, done.tokens)
        run_tokens = config.run_tokens(done.step, done.tokens)
        events = stack.enter_context(EventLog(run if dist.get_rank() == 0 else None, done.step))
        if dist.get_rank() == 0:
            for line in describe_start(start, run, config):
                say(line)
        decided(lambda: check_start(start, config, blend))
        initial = decided(lambda: initial_weights(request, start, config, blend))
        decided(lambda: check_rate(start, config, run_tokens, request.allow_rate_jump))
        settings = json_config.resolve(request.deepspeed, config, request.world_size)
        hosts = everyone(socket.gethostname())
        if dist.get_rank() == 0:
            say(describe_run(config, blend, hosts, json_config.zero_stage(settings), run_tokens))
        agreed(lambda: check_host_memory(config, settings, groups, hosts.count(socket.gethostname())))
        set_tf32(config.training.tf32)
        agreed(lambda: check_overlap(config, request.deepspeed, groups, request.world_size))
        with waiting("building    the model and its optimizer", dist.get_rank() == 0):
            engine = build_engine(config, settings, groups, draw=start.record is None and initial is None)
        load_weights(engine, config, groups, start, initial)
        apply_optimizer_config(engine, config.optimizer)
        write = partial(write_settings, run, settings)
        if describe_passed(config, done) is None:  # else its config would have the length that was asked for in vain
            decided(lambda: write(to_yaml(config)))
        decided(lambda: leave_behind(run, config))
        saves = Saves(engine, config, blend, run)
        probe = partial(probe_loss, engine, config, groups)
        checkpoints = Checkpoints(saves, config.checkpoint, run, start.folder, events, probe)
        events.add("started", done.step, ranks=len(hosts), hosts=list(dict.fromkeys(hosts)), launched=launched)
        loop = _Run(config, groups, engine, blend, validation, hosts, run, stop, checkpoints, events, write)
        loop.run(start.progress)
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
        hosts: list[str],
        folder: Path,
        stop: StopRequest,
        checkpoints: Checkpoints,
        events: EventLog,
        write: Callable[[str], None],
    ) -> None:
        self.config = config
        self.groups = groups
        self.engine = engine
        self.blend = blend
        self.validation = validation
        self.slow_ranks = SlowRanks(hosts)
        self.folder = folder
        self.stop = stop
        self.checkpoints = checkpoints
        self.events = events
        self.write = write
        self.spikes = Spikes(config, self.blend, events)
        self.times: RankTimes | None = None
        self.is_first = dist.get_rank() == 0
        self.mask = loss_mask(config, [*self.blend.corpora, *self.validation.values()])

    def run(self, done: Progress) -> None:
        """Train from after what is done to the end."""
        place: Progress | None = done
        while place is not None:
            place = self.steps(place)

    def steps(self, done: Progress) -> Progress | None:
        """Train from after what is done to the end, or until any rank is asked to stop, or the run goes back.

        Returns:
            Where it has gone back to; None at its end.
        """
        config, replicas = self.config, self.groups.replicas
        loss: float | None = None
        reader = TrainingBatches(self.blend, config.training, replicas.size(), replicas.rank())
        skipped_in_a_row, reason = 0, self._reason(done)
        with ExitStack() as stack:
            recorder = stack.enter_context(Recorder(config, self.folder, done.step)) if self.is_first else None
            self.spikes.begin(recorder.records if recorder else [], done.step)
            batches = stack.enter_context(ReadAhead(reader))
            profiled_steps = config.logging.profile_steps if self.is_first else None
            begin_step = stack.enter_context(profiled(self.folder, profiled_steps, self.groups.device))
            collect_garbage = stack.enter_context(garbage_by_hand())
            while reason is None and done.step < config.training.steps:
                begin_step(done.step + 1)
                before = done
                done, result, told, numbers = self._step(before, batches)
                loss = result.loss
                if self._is_due(done.step, config.training.validation_every_steps):
                    what = (self.validation, config.training, self.groups, self.mask)
                    numbers |= validation_numbers(self.engine, *what)
                if recorder is not None:
                    recorder.record(numbers)
                    self.spikes.look(before, done, loss, result.gradient_norm)
                    self._name_slow_ranks(done.step, told.times, numbers["step_seconds"])
                collect_garbage()
                skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
                self._check_skipped(done.step, skipped_in_a_row, result)
                self.checkpoints.heard(told.written, told.failed)
                if told.spiked and (back := self._go_back(done)) is not None:
                    return back
                if result.stop_requested:
                    reason = self._reason(done)
                if reason is not None or self._is_due(done.step, config.checkpoint.every_steps):
                    self.checkpoints.save(done, is_last=reason is not None or done.step == config.training.steps)
                    # A request that came meanwhile must not wait for another step.
                    reason = reason or self._reason(done)
            # A spike of the last step has no message to be told with.
            spiked = reason is None and any_rank(self.spikes.news > 0, self.groups.device)
            if spiked and (back := self._go_back(done)) is not None:
                return back
            # A request that came while its last step was copied: that checkpoint counts.
            self.checkpoints.finish(is_last=True)
            self._end(done, loss, reason)
            self.checkpoints.settle(reason is None)
            return None

    def _go_back(self, done: Progress) -> Progress | None:
        found = self.spikes.go_back(self.folder, self.config, self.engine, self.checkpoints, done, self.write)
        self.config = self.config if found is None else found[0]
        return None if found is None else found[1].progress

    def _step(self, before: Progress, batches: ReadAhead) -> tuple[Progress, StepResult, StepNews, dict[str, Any]]:
        """Do the step that follows; return how far the run is then, and the record of the step."""
        config, step = self.config, before.step + 1
        began = time.perf_counter()
        sequences = config.sequences_after(before.tokens)
        tokens = before.tokens + sequences * config.model.sequence_length
        rate = config.optimizer.learning_rate_at(tokens, config.run_tokens(before.step, before.tokens))
        then = (tokens, config.sequences_after(tokens)) if step < config.training.steps else None
        batch = batches.after(before.tokens, sequences, then)
        waited = time.perf_counter() - began
        set_learning_rate(self.engine, rate)
        seed_step(config.training.seed, step, self.groups)
        set_batch(self.engine, sequences * config.parallel.context)
        at = (dist.get_rank(), dist.get_world_size())
        try:
            result = optimizer_step(
                self.engine,
                batch.micro_batches,
                self.groups,
                self.mask,
                reporter(step, self.groups.device),
                to_numbers(batch.digest_parts, self.checkpoints.news(), self.spikes.news, self.times, *at),
                stop_requested=lambda: self.stop.reason is not None,
            )
        except DivergedError as error:
            raise self._diverged(step, str(error)) from None
        if config.optimizer.average_decay is not None and not result.skipped:
            update_average(self.engine, config.optimizer.average_decay, step)
        self.times = RankTimes(waited, result.forward_seconds, result.wait_seconds)
        # Ranks of a tensor and context group read the same samples.
        told = StepNews.of(result.sums, config.parallel.tensor * config.parallel.context)
        done = Progress(step, tokens, (before.data_digest + told.digest) % 2**64)
        numbers = step_numbers(config, self.groups, done, result, rate, time.perf_counter() - began, sequences)
        return done, result, told, numbers | summary(told.times)

    def _name_slow_ranks(self, step: int, times: list[RankTimes], seconds: float) -> None:
        for rank, text in self.slow_ranks.look(times, seconds):
            say(f"step {step:,}  {text}")
            self.events.add("slow rank", step, rank=rank, what=text)

    def _check_skipped(self, step: int, in_a_row: int, result: StepResult) -> None:
        if result.skipped and self.is_first:
            say(f"step {step:,}  the update was skipped: the gradient norm is {result.gradient_norm}")
        if in_a_row >= self.config.training.max_skipped_steps:
            raise self._diverged(step, f"{in_a_row} updates in a row were skipped because gradients were not finite")

    def _diverged(self, step: int, text: str) -> DivergedError:
        self.checkpoints.finish(has_ended=True)
        return DivergedError(f"step {step}: {text}; last checkpoint: {self.checkpoints.newest or 'none'}")

    def _reason(self, done: Progress) -> str | None:
        """Why the run is to stop, if any rank was asked to; the same on all."""
        if not any_rank(self.stop.reason is not None, self.groups.device):
            return None
        told = everyone((self.stop.reason, self.stop.is_signalled))
        if done.step < self.config.training.steps:
            self.stop.told([is_signalled for _, is_signalled in told], any(x and not y for x, y in told))
        return next((reason for reason, _ in told if reason is not None), "a request")

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
