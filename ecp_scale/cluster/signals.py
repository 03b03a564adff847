"""Requests to stop: a signal, a launcher that is gone, or a file. The step in progress is finished and saved first."""

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from ecp_scale.cluster.ranks import Process
from ecp_scale.console import say, terminal
from ecp_scale.errors import is_first_rank
from ecp_scale.files import write_text

STOPPED = "stopped.json"
"""In the run folder after a stop that was asked for: where the run stands. A crash leaves none."""
STOP = "stop"
"""A file of this name in the run folder stops the run: touch RUN/stop, on any host that sees the folder."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LAUNCHER_SECONDS = 30.0
"""DeepSpeed's launcher kills ranks so long after it has passed a signal on; that is written into it."""
ECHO_SECONDS = 1.0
"""A terminal, Slurm and a launcher may each pass a request on: the same signal within this time is the same one."""


START_AGAIN = 75
"""Exit code (EX_TEMPFAIL) of ranks that a launcher is to start again, on the hosts that are left."""


class StopRequest:
    """Remembers that this rank was asked to stop; a second signal of the same kind ends the process at once.

    Trap: where a rank is lost, the launcher asks the others to end within a second. After an error a signal therefore
    stays without effect, so that they can say which one it was; the launcher kills whoever takes half a minute for it.
    """

    def __init__(self) -> None:
        self._received: dict[int, float] = {}
        self._before: dict[int, Any] = {}
        self._launchers = _launchers()
        self._file: Path | None = None
        self._failed = False
        self.exit_code = 0
        """Of this rank after the stop; see ``told``."""

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            # What whoever started us ignores stays ignored: SIGHUP under nohup.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._failed = error is not None
        if error is None:
            for number, before in self._before.items():
                signal.signal(number, before)

    def watch(self, run: Path) -> None:
        """Look for ``STOP`` in a run folder from now on; for one rank."""
        self._file = run / STOP
        self._file.unlink(missing_ok=True)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        known = number in self._received
        first = self._received.setdefault(number, now)
        if now - first > ECHO_SECONDS:
            _answer(f"{name:11} again: the run ends at once, not saved")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not known and not self._failed:
            _answer(f"{name:11} ends the run after the step in progress, saved; a second {name} ends it at once")

    @property
    def is_signalled(self) -> bool:
        """Whether this rank wants to stop because of a signal."""
        return bool(self._received)

    def told(self, signalled: Sequence[bool], asked_otherwise: bool = False) -> None:
        """Hear which ranks were signalled, when the launch stops before its end, and whether any was asked otherwise.

        Where only other hosts were, as when a node is drained, and torchrun may start ranks again, this one ends so
        that torchrun does; from exit code 0 it would take the whole run for finished.
        """
        first = int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))
        here = signalled[first : first + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
        may_start = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        if may_start and any(signalled) and not any(here) and not asked_otherwise:
            self.exit_code = START_AGAIN

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop; None where it does not."""
        if self._received:
            return signal.Signals(next(iter(self._received))).name
        if self._file is not None and self._file.exists():
            return f"the file {self._file.name}"
        gone = next((launcher for launcher in self._launchers if not launcher.is_seen()), None)
        return None if gone is None else f"the launcher (process {gone.pid}) is gone"


def _answer(line: str) -> None:
    """Tell the user from a signal handler: past Python's buffers, which a handler must not enter a second time."""
    if is_first_rank():
        with suppress(OSError, ValueError):
            stream = terminal()
            os.write(stream.fileno(), f"{chr(10) * stream.isatty()}{line}\n".encode())  # a bar may stand on the line


def under_deepspeed_launcher() -> bool:
    """Whether DeepSpeed's launcher has started this rank."""
    return "CROSS_RANK" in os.environ  # which only it sets


def _launchers() -> list[Process]:
    """DeepSpeed's launcher of this host and what has started it; torchrun's ranks lose their store with theirs.

    Trap: a signal to ``deepspeed`` alone ends it and leaves the launcher and its ranks at work.
    """
    found = []
    process = psutil.Process().parent() if under_deepspeed_launcher() else None
    for _ in range(2):
        if process is not None and process.pid != 1:
            found.append(Process.of(process.pid))
            process = process.parent()
    return found


def write_stopped(run: Path, reason: str, step: int, checkpoint: Path | None) -> None:
    """Leave word for whoever starts the run again, such as a job script."""
    content = {
        "reason": reason,
        "step": step,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        write_text(run / STOPPED, json.dumps(content) + "\n")
    except OSError as error:
        say(f"{run / STOPPED}: cannot be written ({error.strerror})")
