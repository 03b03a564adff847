"""Digests of whole parameters that do not depend on how ranks share them: sums over their elements, modulo 2^64.

What is added for an element depends on its bits and on its number in the whole parameter, each of which changes it to
another 32-bit number: one changed element always shows, and shares that have changed places but for one time in 2^32.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ecp_scale.parallel.partition import Share

ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements at a time: what a core's cache holds, and what keeps a GPU busy."""
OF_BITS, OF_NUMBER, OF_BOTH = -1640531535, -2048144777, -1028477379
"""Odd numbers whose bits are irregular, so that a product with them, modulo 2^32, mixes the lower bits into all."""


def digest(values: Tensor, share: Share | None = None, start: int = 0) -> int:
    """The part of a parameter's digest that some consecutive elements of a rank's share have.

    Args:
        values: the elements, flat, of any floating-point type; those of padding are left out. What counts is their
            value in fp32.
        share: where the share lies in the whole parameter; None if it is all of it.
        start: number of the first element in the share.

    Returns:
        A number modulo 2^64; the digest is the sum over all shares.
    """
    if share is not None:
        values = values[: max(0, share.elements - start)]
        if share.rows == 1:  # where the whole may end in padding
            start += share.first
            values = values[: max(0, share.whole - start)]
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    count = min(len(values), ELEMENTS.get(values.device.type, ELEMENTS["cpu"]))
    steps = torch.arange(count, device=values.device)
    as_one_run = share is None or share.rows == 1
    of_steps = steps.int().mul_(OF_NUMBER)
    for first in range(start, start + len(values), count or 1):
        bits = values[first - start :][:count].float().contiguous().view(torch.int32)
        mixed = bits * OF_BITS
        if as_one_run:
            mixed += of_steps[: len(bits)]
            mixed += _wrapped(first * OF_NUMBER)
        else:
            assert share is not None
            numbers = steps[: len(bits)] + first
            rows = numbers.div(share.width, rounding_mode="floor")
            numbers += rows.mul_(share.stride - share.width) + share.first
            mixed += numbers.int().mul_(OF_NUMBER)
        mixed ^= (mixed >> 15) & 0x1FFFF
        mixed *= OF_BOTH
        mixed ^= (mixed >> 13) & 0x7FFFF
        total += mixed.sum(dtype=torch.int64)
    return int(total) % 2**64


def _wrapped(number: int) -> int:
    """As an int32 holds it."""
    return (number + 2**31) % 2**32 - 2**31


def as_text(number: int) -> str:
    """A digest as it is written: 16 hexadecimal digits."""
    return f"{number % 2**64:016x}"


def summed(names: Sequence[str], parts: Sequence[Mapping[str, int]]) -> dict[str, str]:
    """Digests of parameters as text, in the order of ``names``, from what each rank has of them."""
    totals = dict.fromkeys(names, 0)
    for part in parts:
        for name in part.keys() & totals.keys():
            totals[name] += part[name]
    return {name: as_text(total) for name, total in totals.items()}


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Which parameter is the first whose digest is another one, and how many are; None if all are equal."""
    names = [*expected, *(name for name in found if name not in expected)]
    differing = [name for name in names if found.get(name) != expected.get(name)]
    if not differing:
        return None
    name = differing[0]
    now, then = (digests.get(name, "none") for digests in (found, expected))
    return f"parameter {name} has the digest {now}, expected {then} ({len(differing)} of {len(names)} differ)"
