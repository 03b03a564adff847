"""What a rank does when another is lost, before it goes: a collective may hang in C, so nothing after it would run."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PATIENCE_SECONDS = 5.0
"""How long a rank may take for it."""
_WORDS: list[tuple[Callable[[], None], bool]] = []


@contextmanager
def before_leaving(action: Callable[[], None], at_exit: bool = False) -> Iterator[None]:
    """While the body runs, do something before this rank leaves a launch that has lost another.

    ``at_exit``: only where the process ends at once, and not where an error ends the body, after which more is done.
    """
    words = (action, at_exit)
    _WORDS.append(words)
    try:
        yield
    finally:
        _WORDS.remove(words)


def say_last_words(is_exit: bool = False) -> None:
    """Do what has been asked for, in a thread that is not waited for longer than ``PATIENCE_SECONDS``."""

    def do() -> None:
        for action in [action for action, at_exit in _WORDS if is_exit or not at_exit]:
            with suppress(Exception):  # another error is what is to be told
                action()

    thread = threading.Thread(target=do, daemon=True, name="last words")
    thread.start()
    thread.join(PATIENCE_SECONDS)


def leave() -> None:
    """End this process at once, with its last words."""
    say_last_words(is_exit=True)
    os._exit(1)
