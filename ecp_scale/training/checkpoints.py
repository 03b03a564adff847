"""When a run is saved, and what is said about it."""

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from ecp_scale.checkpoint.saving import Progress, SaveFailedError, Saves
from ecp_scale.cluster.signals import LAUNCHER_SECONDS, STOP, under_deepspeed_launcher
from ecp_scale.config import CheckpointConfig
from ecp_scale.console import say
from ecp_scale.training.events import EventLog

MIRROR_SECONDS = 300.0
"""How long a run that goes back waits for the next file in a mirror, whose disk may hang."""
LAST_MIRROR_SECONDS = 1800.0
"""How long a finished run does, whose ranks have nothing else to do."""


class Checkpoints:
    """Saves in front of the training, or behind it; all ranks call it alike."""

    def __init__(
        self,
        saves: Saves,
        config: CheckpointConfig,
        run: Path,
        newest: Path | None,
        events: EventLog,
        probe: Callable[[], float] | None = None,
    ) -> None:
        """Args:
        saves: what saves.
        config: of the run.
        run: its folder.
        newest: the checkpoint that it goes on from.
        events: where saves are noted.
        probe: tells the loss of fixed tokens, which is saved with the weights; all ranks call it.
        """
        self.newest = newest
        """The newest checkpoint, which a run can go on from."""
        self._saves = saves
        self._config = config
        self._run = run
        self._events = events
        self._probe = probe
        self._began = 0.0
        self._copied = 0.0
        saves.catch_up(newest)

    def news(self) -> tuple[int, int]:
        """What this rank has to tell the others with the next step, see ``heard``."""
        return self._saves.news()

    def heard(self, written: int, failed: int) -> None:
        """Finish a save behind the training, when all ranks have written, or one could not.

        Args:
            written: the sum over all ranks of the first number of ``news``.
            failed: that of the second.

        Raises:
            SaveFailedError: if it failed, unless the config says to go on.
        """
        if self._saves.in_progress and (failed or written == dist.get_world_size()):
            self.finish()

    def save(self, done: Progress, is_last: bool) -> None:
        """Save what is done; the last time, wait until it stands.

        Raises:
            SaveFailedError: if that failed, or the save before, unless the config says to go on.
        """
        if self._saves.in_progress:
            before = self._saves.done.step
            self._say(
                done.step, f"waits for the save of step {before:,}: the disk is slower than checkpoint.every_steps"
            )
            self.finish()
        loss = self._probe() if self._probe else None
        self._began = time.perf_counter()
        try:
            self._saves.begin(done, loss)
        except SaveFailedError as error:
            self._failed(done.step, error, is_last)
            return
        self._copied = time.perf_counter() - self._began
        if is_last or not self._config.asynchronous:
            self.finish(is_last)

    def finish(self, is_last: bool = False, has_ended: bool = False) -> None:
        """Wait for the save that is in progress, if any; ``has_ended`` says that the run ends for another reason.

        Raises:
            SaveFailedError: if it failed, unless the config says to go on.
        """
        if not self._saves.in_progress:
            return
        step, waiting = self._saves.done.step, time.perf_counter()
        try:
            self.newest = self._saves.finish()
        except SaveFailedError as error:
            if has_ended:
                self._say(step, f"not saved: {error}")
            else:
                self._failed(step, error, is_last)
            return
        seconds = time.perf_counter() - self._began
        self._events.add("saved", step, seconds=seconds, waited=self._copied + time.perf_counter() - waiting)
        text = f"saved in {seconds:.1f} s: {self.newest}"
        if self._config.asynchronous and not is_last:
            text = f"saved {seconds:.1f} s later, copied in {self._copied:.1f} s: {self.newest}"
        elif seconds > LAUNCHER_SECONDS and under_deepspeed_launcher():
            text += (
                f"; after Ctrl-C the deepspeed launcher would kill such a save in {LAUNCHER_SECONDS:.0f} s: to "
                f"stop, touch {self._run / STOP}"
            )
        self._say(step, text)

    def finish_all(self) -> bool:
        """Wait for the save in progress and, for a while, for its copy in the mirror: folders are renamed next.

        Whether the mirror answers, as far as the first rank knows.
        """
        self.finish()
        return self._saves.settle(MIRROR_SECONDS)

    def in_mirror(self, action: Callable[[], None]) -> None:
        """Have something done in the mirror when it answers again."""
        self._saves.in_mirror(action)

    def settle(self, is_finished: bool) -> None:
        """At the end of a finished run: wait for the mirror, unless it hangs. A stopped one has no time."""
        if is_finished:
            self._saves.settle(LAST_MIRROR_SECONDS)
        elif (left := self._saves.not_mirrored()) is not None and dist.get_rank() == 0:
            say(f"mirror      has not got {left.name} yet: the run copies it when it goes on")

    def _failed(self, step: int, error: SaveFailedError, is_last: bool) -> None:
        self._events.add("not saved", step, error=str(error))
        text = f"not saved: {error}; last checkpoint: {self.newest or 'none'}"
        if is_last or self._config.on_failed_save == "stop":
            raise SaveFailedError(f"step {step}: {text}") from None
        self._say(step, text)

    def _say(self, step: int, text: str) -> None:
        if dist.get_rank() == 0:
            say(f"step {step:,}  {text}")
