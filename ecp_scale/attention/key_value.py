"""Keys and values of consecutive positions, and how they fall into segments.

Shapes: B batch, H query heads (local), G key/value heads (local, H a multiple of G), N positions, E head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValue(NamedTuple):
    """Keys and values, each (B, G, N, E); the same tensor twice where K and V are tied.

    ``documents`` (B, N) numbers the document of each position, None where attention may cross documents.
    """

    keys: Tensor
    values: Tensor
    documents: Tensor | None = None

    @property
    def positions(self) -> int:
        """Number of positions, N."""
        return self.keys.shape[-2]

    def split(self, lengths: list[int]) -> list["KeyValue"]:
        """Cut along the positions, keeping tied keys and values one tensor."""
        # split() and not slices: the gradient of S slices is S tensors of full length, that of a split is one.
        keys = self.keys.split(lengths, dim=-2)
        values = keys if self.values is self.keys else self.values.split(lengths, dim=-2)
        documents = [None] * len(lengths) if self.documents is None else self.documents.split(lengths, dim=-1)
        return [KeyValue(*parts) for parts in zip(keys, values, documents, strict=True)]


def join(left: KeyValue, right: KeyValue) -> KeyValue:
    """Concatenate along the positions, keeping tied keys and values one tensor."""
    keys = torch.cat((left.keys, right.keys), dim=-2)
    tied = left.keys is left.values and right.keys is right.values
    values = keys if tied else torch.cat((left.values, right.values), dim=-2)
    if left.documents is None or right.documents is None:
        return KeyValue(keys, values)
    return KeyValue(keys, values, torch.cat((left.documents, right.documents), dim=-1))


def segment_lengths(positions: int, segment_length: int, first_length: int | None = None) -> list[int]:
    """Lengths of the segments that ``positions`` fall into; the last may be shorter, and so may the first."""
    first = min(positions, first_length or segment_length)
    full, tail = divmod(positions - first, segment_length)
    return [first] + [segment_length] * full + [tail] * (tail > 0)
