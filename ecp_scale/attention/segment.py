"""Segment attention, the one primitive of ECP (arXiv 2412.06106, section 3).

Shape suffixes: B batch, H query heads (local), G key/value heads (local, H a multiple of G), N positions,
M positions of one segment, E head width.

Seen from one segment, the pattern is plain: its queries face the keys of [segment to the left, own segment]
under a causal mask aligned to the lower right corner. All of the left segment lies behind every query, the own
segment is causal; a segment without a left neighbour, a last segment that is not full, and one query of a
generation step are the same statement with other sizes.
"""

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KeyValue: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values, each (B, G, positions, E); the same tensor twice where K and V are tied."""


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_length: int,
    left: KeyValue | None = None,
    *,
    dropout: float = 0.0,
) -> tuple[Tensor, KeyValue]:
    """Attend from every segment to itself, causally, and to all of the segment on its left.

    The chunk that ``k`` and ``v`` cover begins on a segment border. ``q`` may cover only its last positions:
    a generation step asks for one token while the keys hold the whole open segment.

    Args:
        q: queries (B, H, Nq, E) of the chunk's last Nq <= N positions.
        k: keys (B, G, N, E), where G divides H (grouped-query attention).
        v: values (B, G, N, E); pass ``k`` itself where K and V are tied.
        segment_length: positions per segment, m in the paper. The last segment need not be full.
        left: keys and values of the segment before the chunk; None at the start of a sequence.
        dropout: probability of dropping an attention weight.

    Returns:
        The attended values (B, H, Nq, E), and ``right``: keys and values of the chunk's last segment, which is
        what the chunk to the right takes as its ``left``.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_shapes(q, k, v, segment_length, left)
    # split() and not slices: the gradient of S slices is S tensors of full length, that of a split is one.
    keys = k.split(segment_length, dim=-2)
    values = keys if v is k else v.split(segment_length, dim=-2)
    answered = k.shape[-2] - q.shape[-2]
    first = answered // segment_length
    queries = q.split(_query_lengths(q.shape[-2], answered, segment_length), dim=-2)

    outputs = []
    for segment, q_BHME in enumerate(queries, start=first):
        previous = (keys[segment - 1], values[segment - 1]) if segment else left
        outputs.append(_attend(q_BHME, (keys[segment], values[segment]), previous, dropout))
    return torch.cat(outputs, dim=-2), (keys[-1], values[-1])


def _attend(q: Tensor, own: KeyValue, left: KeyValue | None, dropout: float) -> Tensor:
    k, v = own if left is None else join(left, own)
    n_query, n_key = q.shape[-2], k.shape[-2]
    mask = None
    if 1 < n_query < n_key:
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=1 < n_query == n_key,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def join(left: KeyValue, right: KeyValue) -> KeyValue:
    """Concatenate along the positions, keeping tied keys and values one tensor."""
    keys = torch.cat((left[0], right[0]), dim=-2)
    tied = left[0] is left[1] and right[0] is right[1]
    return keys, keys if tied else torch.cat((left[1], right[1]), dim=-2)


def _query_lengths(n_query: int, answered: int, segment_length: int) -> list[int]:
    """How the queries fall into segments when the first ``answered`` positions of the chunk ask nothing."""
    head = min(n_query, segment_length - answered % segment_length)
    full, tail = divmod(n_query - head, segment_length)
    return [head] + [segment_length] * full + [tail] * (tail > 0)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, segment_length: int, left: KeyValue | None) -> None:
    if segment_length < 1:
        raise ValueError(f"segment_length is {segment_length}, expected at least 1")
    if k.shape != v.shape:
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} differ in shape")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(k.shape)}: (batch, heads, n, head width)")
    if not 1 <= q.shape[-2] <= k.shape[-2]:
        raise ValueError(f"{q.shape[-2]} queries over {k.shape[-2]} keys; expected 1 <= queries <= keys")
    if left is None:
        return
    expected = (*k.shape[:2], segment_length, k.shape[-1])
    for name, tensor in zip(("keys", "values"), left, strict=True):
        if tensor.shape != expected:
            raise ValueError(f"left {name} are {tuple(tensor.shape)}, expected one full segment {expected}")
