"""What a rank does when another is lost, before it goes: a collective may hang in C, so nothing after it would run."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PATIENCE_SECONDS = 5.0
"""How long a rank may take for it."""
_WORDS: list[Callable[[], None]] = []


@contextmanager
def before_leaving(action: Callable[[], None]) -> Iterator[None]:
    """While the body runs, do something before this rank leaves a launch that has lost another."""
    _WORDS.append(action)
    try:
        yield
    finally:
        _WORDS.remove(action)


def say_last_words() -> None:
    """Do what has been asked for, in a thread that is not waited for longer than ``PATIENCE_SECONDS``."""

    def do() -> None:
        for action in list(_WORDS):
            with suppress(Exception):  # another error is what is to be told
                action()

    thread = threading.Thread(target=do, daemon=True, name="last words")
    thread.start()
    thread.join(PATIENCE_SECONDS)


def leave() -> None:
    """End this process at once, with its last words."""
    say_last_words()
    os._exit(1)
