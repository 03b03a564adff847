"""The positions of the residual stream: their rotations, their documents, and what came before them.

Shapes: B batch, N positions.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ecp_scale.attention import Rotation, SegmentCache

LayerCache = list[SegmentCache]
"""Caches of one layer, one per group of heads that share a pattern."""


def bucket_of(position: int) -> int:
    """Bucket of a position in a window, from 0 on: each is twice as wide as the one before."""
    return position.bit_length()


def buckets(n: int) -> list[tuple[int, int]]:
    """First and last position of the buckets of a window: 0, 1, 2 to 3, 4 to 7 and so on, to n - 1."""
    return [((1 << number) >> 1, min((1 << number) - 1, n - 1)) for number in range(bucket_of(n - 1) + 1)]


class Positions(NamedTuple):
    """The positions that a layer receives.

    ``start`` is the absolute position of the first one; ``documents`` (B, N) numbers the document of each, None without
    a document mask. Where ranks share a sequence it is (B, M + N), with the documents of the segment to the left.
    """

    rotation: Rotation
    documents: Tensor | None
    start: int

    def last(self, count: int) -> "Positions":
        """The last ``count`` of them."""
        if count == (positions := self.rotation.cos.shape[-2]):
            return self
        dropped = positions - count
        documents = None if self.documents is None else self.documents[:, dropped:]
        return Positions(self.rotation.at(slice(dropped, None)), documents, self.start + dropped)


class DocumentIds(NamedTuple):
    """Documents of a batch of tokens, found by the tokens that end them, each of which belongs to what it ends."""

    ids: Tensor
    """Number of the document (B, N), counted from the beginning of the stream."""
    positions: Tensor
    """Position within the document (B, N)."""

    @classmethod
    def of(cls, tokens: Tensor, end_of_document: int, before: "DocumentIds | None" = None) -> "DocumentIds":
        """Find the documents of ``tokens`` (B, N), which continue what ``before`` ended with.

        Args:
            tokens: token ids.
            end_of_document: the id that ends a document.
            before: ids and positions (B, 1) of the next token, as ``next_token`` tells; None at the beginning.
        """
        ends = (tokens == end_of_document).long()
        ids = ends.cumsum(1) - ends
        offsets = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        # The latest beginning at or before each place; -1 where the document began before these tokens.
        begins = torch.where(ends.roll(1, 1).bool() & (offsets > 0), offsets, -1).cummax(1).values
        first = torch.zeros_like(tokens[:, :1]) if before is None else -before.positions
        positions = offsets - torch.where(begins < 0, first.expand_as(begins), begins)
        return cls(ids if before is None else ids + before.ids, positions)

    def next_token(self, tokens: Tensor, end_of_document: int) -> "DocumentIds":
        """Document and position (B, 1) of the token that follows ``tokens``."""
        ended = (tokens[:, -1:] == end_of_document).long()
        return DocumentIds(self.ids[:, -1:] + ended, (self.positions[:, -1:] + 1) * (1 - ended))


@dataclass
class Stream:
    """What a model must remember between two calls over one sequence, for every layer."""

    caches: list[LayerCache]
    position: int = 0
    documents: DocumentIds | None = field(default=None)
    """Document and position of the next token, with a document mask."""
