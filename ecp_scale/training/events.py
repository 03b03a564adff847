"""What happens to a run besides its steps: starts, saves, ends. It is evidence, not state: no resume reads it."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ecp_scale.files import finite

FILE = "events.jsonl"
STARTED = "started"
ENDS = ("finished", "stopped", "failed")
"""Events after which a launch does nothing more; one that is killed has none."""


class EventLog:
    """Appends an object to events.jsonl for everything that happens: ``event``, ``time`` (Unix), ``step``, and more.

    A file that cannot be written loses the event, in silence: what matters is said on the screen too.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        """Args:
        folder: of the run; None, on all ranks but the first, writes nothing.
        step: that is done already.
        """
        self._path = None if folder is None else folder / FILE
        self._step, self._newest = step, ""

    def add(self, event: str, step: int, **more: Any) -> None:
        """Append what has happened after a step, with more about it."""
        self._step, self._newest = step, event
        if self._path is None:
            return
        line = json.dumps(finite({"event": event, "time": time.time(), "step": step, **more})) + "\n"
        try:
            with self._path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # half a line, of a launch that was killed
                        line = "\n" + line
                file.write(line.encode())
        except OSError:
            return

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """An error that ends the launch is an event as well; one that comes before it has started refuses it."""
        if error is not None and self._newest not in ENDS:
            event = "failed" if self._newest else "refused"
            self.add(event, self._step, error=f"{type(error).__name__}: {error}"[:2000])


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Events of a run, oldest first, without lines that cannot be read; none where it has no file."""
    path = folder / FILE
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            event = json.loads(line)
            if isinstance(event["event"], str) and isinstance(event["time"], float) and isinstance(event["step"], int):
                found.append(event)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found
