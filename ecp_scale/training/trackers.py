"""Weights & Biases and TensorBoard beside metrics.jsonl. Neither may end a run, nor hold it up."""

import dataclasses
import importlib.util
import os
import queue
import threading
import uuid
from pathlib import Path
from typing import Any, Protocol

from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.errors import InputError
from ecp_scale.files import write_text

PATIENCE_SECONDS = 10.0
"""How long the end of a run waits for a tracker."""


class Tracker(Protocol):
    """What takes numbers by step."""

    def log(self, record: dict[str, Any]) -> None:
        """Take the numbers of ``record["step"]``."""

    def finish(self, failed: bool) -> None:
        """The run has ended."""


class Background:
    """A tracker in a thread of its own; where it fails, that is said once and the run goes on without it."""

    def __init__(self, name: str, tracker: Any) -> None:
        """Begin.

        Args:
            name: for the user.
            tracker: makes the tracker, in the thread.
        """
        self._name = name
        self._waiting: queue.SimpleQueue[dict[str, Any] | bool] = queue.SimpleQueue()
        self._broken = False
        self._thread = threading.Thread(target=self._work, args=(tracker,), daemon=True, name=name)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Take the numbers of a step; returns at once."""
        if not self._broken:
            self._waiting.put({key: value for key, value in record.items() if value is not None})

    def finish(self, failed: bool) -> None:
        """End, after what is waiting is logged or ``PATIENCE_SECONDS`` are over."""
        self._waiting.put(failed)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            say(f"{self._name} does not answer; the run ends without it")

    def _work(self, make: Any) -> None:
        try:
            tracker: Tracker = make()
            while not isinstance(item := self._waiting.get(), bool):
                tracker.log(item)
            tracker.finish(item)
        except BaseException as error:  # wandb ends threads with exceptions of every kind
            self._broken = True
            reason = next(iter(str(error).splitlines()), "")
            say(f"{self._name} has failed ({reason or type(error).__name__}); the run goes on without it")


class Wandb:
    """Weights & Biases; a resumed run continues its own record, kept in the run folder, and no other."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", config.logging.wandb)
        if mode == "online" and not wandb.api.api_key:  # it would ask at a terminal
            raise RuntimeError("no API key: set WANDB_API_KEY, run `wandb login`, or logging.wandb offline")
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.logging.run_name or folder.name,
            id=wandb_identity(folder),
            resume="allow",
            mode=mode,
            dir=folder,
            config=dataclasses.asdict(config),
        )

    def log(self, record: dict[str, Any]) -> None:
        """Take the numbers of a step."""
        self._run.log(scalars(record), step=record["step"])

    def finish(self, failed: bool) -> None:
        """The run has ended."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        """Take the numbers of a step."""
        for key, value in scalars(record).items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(key, value, record["step"])

    def finish(self, failed: bool) -> None:
        """The run has ended."""
        self._writer.close()


def scalars(record: dict[str, Any]) -> dict[str, Any]:
    """What of the numbers of a step is one value; of several each, the loss by position under its first position.

    Trackers have clocks of their own.
    """
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key == "time":
            continue
        if isinstance(value, dict):
            found |= {f"{key}/{name}": number for name, number in value.items()}
        elif isinstance(value, list):
            found |= {f"{key}/from_{first:06}": number for first, _, number in value}
        else:
            found[key] = value
    return found


def wandb_identity(folder: Path) -> str:
    """The id of the run of this folder; a copy of the folder, where a run goes on by itself, gets another one."""
    path, of = folder / "wandb_id", str(folder.resolve())
    found, _, owner = path.read_text().partition("\n") if path.exists() else ("", "", "")
    if not found or owner not in ("", of):  # an earlier version did not write whose it is
        found = uuid.uuid4().hex[:8]
    write_text(path, f"{found}\n{of}")
    return found


def start_trackers(config: Config, folder: Path) -> list[Tracker]:
    """The trackers that the config asks for."""
    found: list[Tracker] = []
    if config.logging.wandb != "disabled":
        found.append(Background("wandb", lambda: Wandb(config, folder)))
    if config.logging.tensorboard:
        found.append(Background("TensorBoard", lambda: TensorBoard(folder)))
    return found


def check_trackers(config: Config) -> None:
    """Refuse a run that wants a tracker that is not installed.

    Raises:
        InputError: naming the extra to install.
    """
    wanted = {
        "wandb": (config.logging.wandb != "disabled", f"logging.wandb is {config.logging.wandb}"),
        "tensorboard": (config.logging.tensorboard, "logging.tensorboard is true"),
    }
    for name, (is_wanted, what) in wanted.items():
        if is_wanted and importlib.util.find_spec(name) is None:
            raise InputError(f"{what} but {name} is missing: pip install 'ecp-scale[{name}]'")
