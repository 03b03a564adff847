"""Checks that hold for the fields of every section."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

LARGEST = 2**62
"""Numbers beyond do not fit where they are used."""


def not_positive(section: str, config: object, names: tuple[str, ...]) -> list[str]:
    """A problem for every field that is not above 0."""
    values = [(name, getattr(config, name)) for name in names]
    return [f"{section}.{name} is {value}, expected more than 0" for name, value in values if not value > 0]


def unusable(section: str, config: Any) -> list[str]:
    """A problem for every number that is not finite or beyond what can be computed with, and every text with a NUL."""
    values = [(item.name, getattr(config, item.name)) for item in dataclasses.fields(config)]
    texts = [
        f"{section}.{name} is {value!r}, expected text without a NUL"
        for name, value in values
        if isinstance(value, str | dict) and "\\x00" in repr(value)
    ]
    return texts + [
        f"{section}.{name} is {value}, expected a number of at most 2^62"
        for name, value in values
        if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= LARGEST)
    ]


def range_problems(ranges: Mapping[int, int], field: str) -> list[str]:
    """What is wrong with ranges that should each be a first and a last sample, one after another."""
    found = [
        f"{field} from {first} to {last}, expected a first sample of at least 0 and a last one that is not before it"
        for first, last in ranges.items()
        if not 0 <= first <= last
    ]
    pairs = itertools.pairwise(sorted(ranges.items()))
    return found or [
        f"{field}: {first} to {last} and {after} to {end} have samples in common, expected ranges apart"
        for (first, last), (after, end) in pairs
        if after <= last
    ]
