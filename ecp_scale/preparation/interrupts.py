"""Ctrl-C between documents: never in the middle of one, nor of what is written about it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Lets Ctrl-C raise ``KeyboardInterrupt`` at once, but where it is held: then when the outermost hold ends.

    Trap: a signal mask is not enough. Another thread of the process may take the signal, and the main thread, whose
    mask blocks it, runs the handler all the same.
    """

    def __init__(self) -> None:
        self.held = _Held()
        self._before: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # which alone may set handlers, and gets the signal
            self._before = signal.signal(signal.SIGINT, self._answer)
        return self

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self.held.depth:
            self.held.came = True
        else:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class _Held:
    def __init__(self) -> None:
        self.depth = 0
        self.came = False

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.depth -= 1
        if self.came and kind is None and not self.depth:
            self.came = False
            raise KeyboardInterrupt
