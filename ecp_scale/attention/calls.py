"""Segment attention as a few dense calls of a kernel, each for many segments at once.

A kernel that aligns its causal mask to the lower right corner takes a segment's queries with the keys of [left
neighbour, own segment] in one call: the mask is the pattern. One that does not takes two, the segment with itself and
with its neighbour; their outputs are weighed by the normalisers of their rows. Either way n * 1.5m pairs of scores are
computed, or n * 2m less what a kernel skips, and none is masked away by a tensor.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from ecp_scale.attention.key_value import segment_lengths


class Pattern(NamedTuple):
    """Who sees whom, but for documents: queries of the last positions of a chunk that begins on a segment border."""

    n_query: int
    n_key: int
    segment_length: int
    """Positions of a segment; the last one need not be full."""
    first_length: int
    """Those of the first one, which may be shorter."""
    look_back: bool = True
    """Whether segments see their left neighbours."""
    window: int | None = None
    """How many positions a query sees at most, its own included."""

    @property
    def grain(self) -> int:
        """What divides the lengths of all stretches."""
        return math.gcd(self.n_query, self.n_key, self.segment_length, self.first_length)

    @property
    def lengths(self) -> list[int]:
        """Positions of every segment."""
        return segment_lengths(self.n_key, self.segment_length, self.first_length)


class Call(NamedTuple):
    """Stretches of queries, one behind the other, each with a stretch of keys that ends where it ends.

    Positions are those of the keys. A stretch faces ``left`` keys of the segment before its own, then ``own`` of its
    own segment; without own ones its rows have been computed with those before, and the two are to be merged.
    """

    first_query: int
    queries: int
    first_key: int
    left: int
    own: int
    causal: bool
    stretches: int = 1

    def continues(self, before: "Call") -> bool:
        """Whether this is the next stretch of ``before``."""
        alike = self._replace(first_query=0, first_key=0) == before._replace(first_query=0, first_key=0, stretches=1)
        step = before.stretches * before.queries
        return alike and self.first_query - before.first_query == self.first_key - before.first_key == step


@cache
def segment_calls(pattern: Pattern, lower_right: bool) -> tuple[Call, ...]:
    """The calls of a pattern, whose window is the kernel's to keep.

    Where a position is the own key of one call and the left key of another, the former comes first.

    Args:
        pattern: who sees whom.
        lower_right: whether the kernel aligns its causal mask to the lower right corner.
    """
    single: list[Call] = []
    start = before = 0
    for length in pattern.lengths:
        queries = min(length, start + length - (pattern.n_key - pattern.n_query))
        left, place = before * pattern.look_back, start + length - queries
        if queries > 0 and lower_right:
            single.append(Call(place, queries, start - left, left, length, causal=True))
        elif queries > 0:
            single.append(Call(place, queries, start, 0, length, causal=queries > 1))
            if left:
                single.append(Call(place, queries, start - left, left, 0, causal=False))
        before, start = length, start + length
    return tuple(_batched(single))


def _batched(calls: Iterable[Call]) -> list[Call]:
    found: list[Call] = []
    for call in calls:
        number = next((i for i in range(len(found))[::-1] if call.continues(found[i])), None)
        if number is None:
            found.append(call)
        else:
            found[number] = found[number]._replace(stretches=found[number].stretches + 1)
    return found
