"""Ctrl-C between documents: never in the middle of one, nor of what is written about it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


@contextmanager
def postponed() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block.

    Trap: a signal mask is not enough. Another thread of the process may take the signal, and the main thread, whose
    mask blocks it, runs the handler all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


class Interrupts:
    """Lets Ctrl-C raise ``KeyboardInterrupt`` at once, but where it is held: then when that ends."""

    def __init__(self) -> None:
        self.held = _Held()
        self._before: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # which alone may set handlers, and gets the signal
            self._before = signal.signal(signal.SIGINT, self._answer)
        return self

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self.held.is_held:
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
        self.is_held = False
        self.came = False

    def __enter__(self) -> None:
        self.is_held = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_held = False
        if self.came and kind is None:
            self.came = False
            raise KeyboardInterrupt
