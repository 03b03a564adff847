"""Command lines of the benchmarks: numbers that can be measured with, and one line for those that cannot."""

import argparse
import math


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def count(text: str) -> int:
    """An option's whole number from 1.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def counts(text: str) -> list[int]:
    """An option's whole numbers from 1, with commas between them.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return [count(part) for part in text.split(",")]


def rate(text: str) -> float:
    """An option's number above 0.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return value
