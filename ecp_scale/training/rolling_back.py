"""What a run does at a spike of its loss: it says so, or goes back and passes over the samples around it."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ecp_scale.checkpoint.resuming import Start, find_start, leave_behind, load
from ecp_scale.checkpoint.saving import Progress
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.data.blend import Blend
from ecp_scale.data.passed_over import PassedOver, merged
from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import decided
from ecp_scale.training.checkpoints import Checkpoints
from ecp_scale.training.events import EventLog
from ecp_scale.training.spikes import WINDOW, Spike, SpikeWatch
from ecp_scale.zero.engine import Engine, apply_optimizer_config

MOST = 5
"""Times that a launch goes back; what spikes after that is not the data."""


class Spikes:
    """Watches a run, on its first rank, and decides whether it goes back.

    A spike is known when its step is done, and told to the other ranks with the message of the next one.
    """

    def __init__(self, config: Config, blend: Blend, events: EventLog) -> None:
        """Args:
        config: of the run.
        blend: its data.
        events: where spikes are noted.
        """
        self._config = config
        self._blend = blend
        self._events = events
        self._left = MOST
        self._last = 0
        self._found: Spike | None = None
        self._watch = SpikeWatch(config.training.spike_score)
        self._begun: deque[tuple[int, int]] = deque(maxlen=config.training.spike_skip_steps + 1)

    @property
    def news(self) -> int:
        """1 where the run is to go back, for the next message."""
        return int(self._found is not None)

    def begin(self, records: Iterable[Mapping[str, Any]], step: int) -> None:
        """The run goes on after ``step``; ``records`` are those of the steps so far."""
        self._found = None
        self._begun.clear()
        self._watch = SpikeWatch(self._config.training.spike_score)
        before = 0
        for record in [one for one in records if one["step"] <= step][-WINDOW:]:
            if record.get("loss") is not None and record.get("grad_norm") is not None:
                self._watch.look(
                    record["step"], record["loss"], record["grad_norm"], self._setting(before, record["tokens"])
                )
            before = record["tokens"]

    def look(self, before: Progress, done: Progress, loss: float, norm: float) -> None:
        """Take the numbers of the step between two places of the run."""
        self._begun.append((done.step, before.tokens))
        for spike in self._watch.look(done.step, loss, norm, self._setting(before.tokens, done.tokens)):
            goes_back = spike.what == "loss" and self._config.training.on_spike == "roll_back" and self._left > 0
            if spike.step > self._last + 1 or goes_back:  # one that lasts is said once
                say(f"step {spike.step:,}  {spike}")
            self._last = spike.step
            about = {"what": spike.what, "value": spike.value, "usual": spike.usual, "score": spike.score}
            self._events.add("spike", spike.step, **about)
            if goes_back and self._found is None:
                self._found = spike

    def _setting(self, before: int, after: int) -> tuple[int, int]:
        """What the numbers of a step depend on besides the weights: the mixture of corpora, the size of the batch."""
        sample = next(iter(self._blend.samples(before, 1)))
        return self._blend.phase(sample), after - before

    def go_back(
        self, run: Path, config: Config, engine: Engine, checkpoints: Checkpoints, done: Progress
    ) -> tuple[Config, Start] | None:
        """Fill the engine with the newest checkpoint that has read none of the samples to pass over; all ranks call it.

        Args:
            run: its folder.
            config: of the run.
            engine: to fill.
            checkpoints: of the run.
            done: how far it is.

        Returns:
            The config with what is passed over, and the place to go on from; None where no checkpoint is old enough,
            and the run goes on.
        """
        checkpoints.finish()
        checkpoints.settle(True)
        self._left -= 1
        found = decided(lambda: self._choose(run, config, done))
        self._found = None
        if isinstance(found, str):
            if dist.get_rank() == 0:
                say(f"step {done.step:,}  cannot go back, and goes on: {found}")
            return None
        new, start, (first, last) = found
        assert start.folder is not None
        load(engine, new, start)
        apply_optimizer_config(engine, new.optimizer)
        self._config, self._blend.passed_over = new, PassedOver(new.training.skip_samples)
        checkpoints.newest = start.folder
        if dist.get_rank() == 0:
            say(f"rolled back to {start.folder.name}; training.skip_samples now passes over {first:,} to {last:,}")
            self._events.add("rolled back", start.progress.step, from_step=done.step, samples=[first, last])
        decided(lambda: leave_behind(run, start, new))
        return new, start

    def _choose(self, run: Path, config: Config, done: Progress) -> tuple[Config, Start, tuple[int, int]] | str:
        """The config, the start and the samples passed over: those of the steps up to the spike and of the one after.

        As text, why the run cannot go back.
        """
        assert self._found is not None
        oldest = self._found.step - self._config.training.spike_skip_steps + 1
        begin = min(tokens for step, tokens in self._begun if step >= oldest)
        n, read = self._blend.sequence_length, self._blend.passed_over
        first, last = read.sample(begin // n), read.sample(done.tokens // n - 1)
        ranges = merged(config.training.skip_samples or {}, first, last)
        new = dataclasses.replace(config, training=dataclasses.replace(config.training, skip_samples=ranges))
        try:
            start = find_start(run, True, new)
        except InputError as error:
            return str(error).replace("\n", " ")
        return (new, start, (first, last)) if start.folder is not None else "the run has no checkpoint yet"
