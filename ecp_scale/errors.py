"""The one kind of error that is the user's to mend."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: names the file, field or rank, what was found and what was expected."""


def is_first_rank() -> bool:
    """Whether this process speaks for the launch: rank 0, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def input_errors_exit() -> Iterator[None]:
    """Print an ``InputError`` as one message and exit with code 2; anything else is a bug and keeps its traceback.

    Every rank of a launch raises the same error (see ``ecp_scale.parallel.groups.agreed``); rank 0 prints it.
    """
    try:
        yield
    except InputError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
