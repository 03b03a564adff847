"""What a run does at a spike of its loss: it says so, or goes back and passes over the samples around it."""

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ecp_scale.checkpoint.resuming import Start, find_start, leave_behind, leave_behind_in_mirror, load, with_ranges
from ecp_scale.checkpoint.saving import Progress
from ecp_scale.command_line import to_yaml
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.data.blend import Blend
from ecp_scale.data.passed_over import PassedOver
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
        self._gave_up = False
        self._found: Spike | None = None
        self._watch = SpikeWatch(config.training.spike_score)
        self._begun: deque[tuple[int, int]] = deque(maxlen=config.training.spike_skip_steps + 1)

    @property
    def news(self) -> int:
        """1 where the run is to go back, for the next message."""
        return int(self._found is not None)

    def begin(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """The run goes on after ``step``; ``records`` are those of the steps so far.

        A spike of the last of them is acted on as if the run had not been interrupted.
        """
        self._found = None
        self._begun.clear()
        self._last = 0
        self._watch = SpikeWatch(self._config.training.spike_score)
        known = [record for record in records if record["step"] <= step]
        wanted = max(WINDOW, self._config.training.spike_skip_steps) + 2
        spikes: list[Spike] = []
        for previous, record in itertools.pairwise([{"tokens": 0}, *known][-wanted:]):
            before, done = previous["tokens"], record["tokens"]
            self._begun.append((record["step"], before))
            loss, norm = (record.get(name) for name in ("loss", "grad_norm"))
            if loss is not None:
                norm = math.nan if norm is None else norm
                spikes = self._watch.look(record["step"], loss, norm, self._setting(before, done))
        self._decide([spike for spike in spikes if spike.step == step])

    def look(self, before: Progress, done: Progress, loss: float, norm: float) -> None:
        """Take the numbers of the step between two places of the run."""
        self._begun.append((done.step, before.tokens))
        found = self._watch.look(done.step, loss, norm, self._setting(before.tokens, done.tokens))
        lasts = done.step <= self._last + 1  # one that lasts is said once, and tried once where the run cannot go back
        self._gave_up = self._gave_up and lasts
        for spike in found:
            if not lasts:
                say(f"step {spike.step:,}  {spike}")
            self._last = spike.step
            about = {"what": spike.what, "value": spike.value, "usual": spike.usual, "score": spike.score}
            self._events.add("spike", spike.step, **about)
        self._decide(found)

    def _decide(self, found: Sequence[Spike]) -> None:
        """Whether to go back from a spike of the loss."""
        may = self._config.training.on_spike == "roll_back" and self._left > 0 and not self._gave_up
        if may and self._found is None:
            self._found = next((spike for spike in found if spike.what == "loss"), None)

    def _setting(self, before: int, after: int) -> tuple[int, int]:
        """What the numbers of a step depend on besides the weights: the mixture of corpora, the size of the batch."""
        sample = next(iter(self._blend.samples(before, 1)))
        return self._blend.phase(sample), after - before

    def go_back(
        self,
        run: Path,
        config: Config,
        engine: Engine,
        checkpoints: Checkpoints,
        done: Progress,
        write: Callable[[str], None],
    ) -> tuple[Config, Start] | None:
        """Fill the engine with the newest checkpoint that has read none of the samples to pass over; all ranks call it.

        Args:
            run: its folder.
            config: of the run.
            engine: to fill.
            checkpoints: of the run.
            done: how far it is.
            write: writes the config into the folder.

        Returns:
            The config with what is passed over, and the place to go on from; None where no checkpoint is old enough,
            and the run goes on.
        """
        mirror_answers = checkpoints.finish_all()
        found = decided(lambda: self._choose(run, config, done, mirror_answers))
        self._found = None
        if isinstance(found, str):
            self._gave_up = True
            if dist.get_rank() == 0:
                say(f"step {done.step:,}  cannot go back, and goes on: {found}")
            return None
        new, start, (first, last) = found
        assert start.folder is not None
        self._left -= 1
        # First: whoever starts the run again after a crash passes over the same samples.
        decided(lambda: write(to_yaml(new)))
        decided(lambda: leave_behind(run, new if mirror_answers else _without_mirror(new)))
        if not mirror_answers:
            checkpoints.in_mirror(lambda: leave_behind_in_mirror(new))
        load(engine, new, start)
        apply_optimizer_config(engine, new.optimizer)
        self._config, self._blend.passed_over = new, PassedOver(new.training.skip_samples)
        checkpoints.newest = start.folder
        if dist.get_rank() == 0:
            say(f"rolled back to {start.folder.name}; training.skip_samples now passes over {first:,} to {last:,}")
            self._events.add("rolled back", start.progress.step, from_step=done.step, samples=[first, last])
        return new, start

    def _choose(
        self, run: Path, config: Config, done: Progress, mirror_answers: bool
    ) -> tuple[Config, Start, tuple[int, int]] | str:
        """The config, the start and the samples passed over: those of the steps up to the spike and of the one after.

        As text, why the run cannot go back.
        """
        assert self._found is not None
        oldest = self._found.step - self._config.training.spike_skip_steps + 1
        begin = min((tokens for step, tokens in self._begun if step >= oldest), default=done.tokens)
        n, read = self._blend.sequence_length, self._blend.passed_over
        first, last = read.sample(begin // n), read.sample(done.tokens // n - 1)
        new = with_ranges(config, {first: last})
        with suppress(InputError):
            try:
                start = find_start(run, True, new if mirror_answers else _without_mirror(new))
            except OSError:  # of the mirror, without which the run goes back; or of its own folder, which is told now
                start = find_start(run, True, _without_mirror(new))
            if start.folder is not None:
                # A run of training.tokens has other steps from here, where its batch or length has changed since.
                return new.with_length(start.progress.step, start.progress.tokens), start, (first, last)
        return f"no checkpoint from before step {max(1, oldest):,} is left"


def _without_mirror(config: Config) -> Config:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, mirror=None))
