"""The errors that are not bugs: bad input, which the user can correct, and a rank that is lost."""

import io
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE_SECONDS = 2.0
"""How long a rank that refuses its input waits for the first one to do so."""


class InputError(ValueError):
    """Bad input: names the file, field or rank, what was found and what was expected."""


class AgreedError(InputError):
    """Bad input that every rank of the launch has been told of, so that the first one alone says it."""


class DamagedDataError(InputError):
    """Data that one rank finds to be damaged while it runs; the others do not know, so that rank says it."""


class LostRankError(RuntimeError):
    """A rank of the launch did not come, or died: names it and its host.

    ``reports``: whether this rank says so; on every host one does, since nobody knows who else is left.
    """

    def __init__(self, message: str, reports: bool) -> None:
        super().__init__(message)
        self.reports = reports


def is_first_rank() -> bool:
    """Whether this process reports for the launch: rank 0, the only process, or one whose rank is no number."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0


def is_first_of_host() -> bool:
    """Whether this process is the first one of its host, or its place there is no number."""
    rank = os.environ.get("LOCAL_RANK", "0")
    return not rank.isdecimal() or int(rank) == 0


def _say_input_error(error: InputError) -> None:
    """Once for the launch; once for each host while ranks cannot yet agree, since another host may see other files."""
    if is_first_rank():
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, DamagedDataError) or (is_first_of_host() and not isinstance(error, AgreedError)):
        where = f"rank {os.environ['RANK']} on host {socket.gethostname()}"
        print(f"error on {where}: {error}", file=sys.stderr, flush=True)


@contextmanager
def input_errors_exit() -> Iterator[None]:
    """Print an ``InputError`` as one message and exit with code 2, a ``LostRankError`` with 1, at Ctrl-C with 130.

    Anything else is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        yield
    except InputError as error:
        _say_input_error(error)
        if not is_first_rank():
            # A launcher ends all ranks when it sees the first of them end: let that be the one that says why.
            time.sleep(GRACE_SECONDS)
        sys.exit(2)
    except LostRankError as error:
        if error.reports:
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt as error:
        if is_first_rank():
            print(f"interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
