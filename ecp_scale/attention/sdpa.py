"""Attention by torch's scaled_dot_product_attention: of queries over keys, of which every pattern is made.

Shapes: B batch, H query heads (local), G key/value heads (local, H a multiple of G), Nq and Nk positions,
E head width.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ecp_scale.precision import product_type


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


def attend(
    q: Tensor, key_value: KeyValue, *, causal: bool = True, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend from the last Nq of the Nk positions that ``key_value`` covers.

    A causal mask is thus aligned to the lower right corner. Every query sees at least its own position.

    Args:
        q: queries (B, H, Nq, E), Nq <= Nk.
        key_value: keys, values and documents of Nk positions; with documents, a query sees its own document alone.
        causal: whether a query is blind to the positions after its own.
        window: of a causal pattern, how many positions a query sees at most, its own included.
        dropout: probability of dropping an attention weight.

    Returns:
        The attended values (B, H, Nq, E).
    """
    n_query, n_key = q.shape[-2], key_value.positions
    if window is not None and window >= n_key:
        window = None
    mask = None
    plain = window is None and key_value.documents is None
    if not plain or (causal and 1 < n_query < n_key):
        mask = _visible(n_query, n_key, causal, window, key_value.documents, q.device)
    wide = product_type(q)
    attended = scaled_dot_product_attention(
        q.to(wide),
        key_value.keys.to(wide),
        key_value.values.to(wide),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and n_query > 1,
        enable_gqa=q.shape[1] != key_value.keys.shape[1],
    )
    return attended.to(q.dtype)


def _visible(
    n_query: int, n_key: int, causal: bool, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """Who sees whom: (Nq, Nk), or (B, 1, Nq, Nk) with documents."""
    behind = n_key - n_query
    visible = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril(behind)
    if window is not None:
        visible = visible.triu(behind - window + 1)
    if documents is not None:
        visible = visible & (documents[:, behind:, None] == documents[:, None, :])[:, None]
    return visible


def sdpa_segments(
    q: Tensor, segments: list[KeyValue], look_back: bool, window: int | None, dropout: float
) -> list[Tensor]:
    """Segment attention by one call per segment; the arguments are those of ``segment_attention``.

    Args:
        q: queries (B, H, Nq, E) of the last Nq positions of the segments.
        segments: keys, values and documents of every segment.
        look_back: whether segments see their left neighbours.
        window: how many positions a query sees at most, its own included.
        dropout: probability of dropping an attention weight.

    Returns:
        The attended values, one tensor (B, H, N, E) for each segment that has queries.
    """
    ends = list(itertools.accumulate(segment.positions for segment in segments))
    before = ends[-1] - q.shape[-2]
    counts = [min(segment.positions, max(0, end - before)) for segment, end in zip(segments, ends, strict=True)]
    outputs = []
    for number, queries in enumerate(q.split(counts, dim=-2)):
        if queries.shape[-2]:
            seen = join(segments[number - 1], segments[number]) if number and look_back else segments[number]
            outputs.append(attend(queries, seen, window=window, dropout=dropout))
    return outputs


def segment_lengths(positions: int, segment_length: int, first_length: int | None = None) -> list[int]:
    """Lengths of the segments that ``positions`` fall into; the last may be shorter, and so may the first."""
    first = min(positions, first_length or segment_length)
    full, tail = divmod(positions - first, segment_length)
    return [first] + [segment_length] * full + [tail] * (tail > 0)
