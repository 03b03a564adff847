"""Options of the benchmarks: numbers that can be measured with."""

import argparse
import math


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
