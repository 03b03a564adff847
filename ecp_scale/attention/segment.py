"""Segment attention, the one primitive of ECP (arXiv 2412.06106, section 3), and of every causal pattern here.

Seen from one segment, the pattern is plain: its queries face the keys of [segment to the left, own segment]
under a causal mask aligned to the lower right corner. All of the left segment lies behind every query, the own
segment is causal; a segment without a left neighbour, a last segment that is not full, and one query of a
generation step are the same statement with other sizes. So are other patterns: full causal attention is one segment,
a sliding window of w tokens is segments of w with all but the last w keys hidden, groups are segments that do not
look back.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ecp_scale.attention.calls import Pattern, segment_calls
from ecp_scale.attention.flash import flash_attention
from ecp_scale.attention.flex import flex_attention, flex_serves
from ecp_scale.attention.kernels import Settings, kernel_for
from ecp_scale.attention.key_value import KeyValue, join, segment_lengths
from ecp_scale.attention.pieces import attend_by_pieces, once_for
from ecp_scale.attention.sdpa import attend, attend_by_segment
from ecp_scale.config import AttentionBackend

Exchange: TypeAlias = Callable[[KeyValue], Callable[[], KeyValue]]
"""Gives ``right`` away at once, and promises ``left``."""


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_length: int,
    left: KeyValue | Exchange | None = None,
    *,
    look_back: bool = True,
    window: int | None = None,
    first_length: int | None = None,
    documents: Tensor | None = None,
    dropout: float = 0.0,
    backend: AttentionBackend = "auto",
) -> tuple[Tensor, KeyValue]:
    """Attend from every segment to itself, causally, and to all of the segment on its left.

    The chunk that ``k`` and ``v`` cover begins on a segment border. ``q`` may cover only its last positions:
    a generation step asks for one token while the keys hold the whole open segment.

    Args:
        q: queries (B, H, Nq, E) of the chunk's last Nq <= N positions.
        k: keys (B, G, N, E), where G divides H (grouped-query attention).
        v: values (B, G, N, E); pass ``k`` itself where K and V are tied.
        segment_length: positions per segment, m in the paper. The last segment need not be full.
        left: keys and values of the segment before the chunk; None, or no positions, at the start of a sequence. An
            exchange is given ``right`` first, and asked for ``left`` when every other segment is done.
        look_back: False hides the left segment, so that every segment is alone.
        window: how many positions a query sees at most, its own included; at most ``segment_length`` + 1 are in view.
        first_length: positions of the chunk's first segment, where it is shorter.
        documents: number of the document (B, N) of every position, or (B, M + N) with those of a ``left`` that has
            none of its own; attention does not cross documents.
        dropout: probability of dropping an attention weight.
        backend: how it is computed.

    Returns:
        The attended values (B, H, Nq, E), and ``right``: keys and values of the chunk's last segment, which is
        what the chunk to the right takes as its ``left``.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_shapes(q, k, v, segment_length, left)
    lengths = segment_lengths(k.shape[-2], segment_length, first_length)
    with_left = documents
    if with_left is not None and with_left.shape[-1] > k.shape[-2]:
        documents = once_for(with_left, ("last", k.shape[-2]), lambda: with_left[:, -k.shape[-2] :].clone())
    chunk = KeyValue(k, v, documents)
    segments = chunk.split(lengths)
    # The first segment comes last: the others need not wait for its neighbour.
    promise = left(segments[-1]) if callable(left) else lambda: left
    waiting = max(0, q.shape[-2] - k.shape[-2] + lengths[0]) if look_back and left is not None else 0
    outputs = []
    first, rest = q.split([waiting, q.shape[-2] - waiting], dim=-2) if waiting else (None, q)
    if rest.shape[-2]:
        pattern = Pattern(rest.shape[-2], k.shape[-2], segment_length, lengths[0], look_back, window)
        outputs += _attend(rest, chunk, pattern, dropout, backend)
    if first is not None:
        seen = _behind(promise(), segments[0], with_left)
        before = seen.positions - lengths[0]
        pattern = Pattern(waiting, seen.positions, segment_length, before or lengths[0], True, window)
        outputs = [*_attend(first, seen, pattern, dropout, backend), *outputs]
    return torch.cat(outputs, dim=-2) if len(outputs) > 1 else outputs[0], segments[-1]


def _attend(q: Tensor, chunk: KeyValue, pattern: Pattern, dropout: float, backend: AttentionBackend) -> list[Tensor]:
    """Attended values (B, H, Nq, E) of a chunk without a neighbour, in parts, by the kernel that serves."""
    settings = Settings(pattern.window, dropout)
    keys, values, documents = chunk
    by_flash = backend in ("auto", "flash")
    kernel = kernel_for(q, keys, settings, documents is not None, pattern.grain) if by_flash else None
    wants_flex = backend == "flex" or (backend == "auto" and q.is_cuda and kernel is None)
    attended = attend_by_pieces(q, chunk, pattern, kernel, settings)
    if attended is not None:
        return [attended]
    if kernel is not None and documents is None:
        calls = segment_calls(pattern, kernel.lower_right)
        square = all(call.queries == call.left + call.own or not call.causal for call in calls)
        serves = kernel.lower_right or (square and q.shape[-2] > 1)
        # What one plain causal call computes, torch's own choice among its kernels computes best.
        is_plain = square and len(calls) == calls[0].stretches == 1 and settings == Settings()
        if serves and not is_plain:
            return [flash_attention(q, keys, values, calls, kernel, settings)]
    if wants_flex and not dropout and q.shape[-2] > 1 and flex_serves(q):
        return [flex_attention(q, chunk, pattern)]
    lengths = pattern.lengths
    if len(lengths) <= 1 + pattern.look_back and q.shape[-2] <= lengths[-1]:
        return [attend(q, chunk, window=pattern.window, dropout=dropout, backend=backend)]
    return attend_by_segment(q, chunk.split(lengths), pattern.look_back, settings, backend)


def _behind(left: KeyValue | None, segment: KeyValue, with_left: Tensor | None) -> KeyValue:
    """What a segment sees: its neighbour and itself; ``with_left`` (B, M + N) has the documents of both."""
    if left is None:
        return segment
    seen = join(left, segment)
    if with_left is None or left.documents is not None:
        return seen
    return seen._replace(
        documents=once_for(with_left, ("first", seen.positions), lambda: with_left[:, : seen.positions].clone())
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, segment_length: int, left: KeyValue | Exchange | None) -> None:
    if segment_length < 1:
        raise ValueError(f"segment_length is {segment_length}, expected at least 1")
    if k.shape != v.shape:
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} differ in shape")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(k.shape)}: (batch, heads, n, head width)")
    if not 1 <= q.shape[-2] <= k.shape[-2]:
        raise ValueError(f"{q.shape[-2]} queries over {k.shape[-2]} keys; expected 1 <= queries <= keys")
    if not isinstance(left, KeyValue) or left.positions == 0:
        return
    expected = (*k.shape[:2], segment_length, k.shape[-1])
    for name, tensor in (("keys", left.keys), ("values", left.values)):
        if tensor.shape != expected:
            raise ValueError(f"left {name} are {tuple(tensor.shape)}, expected one full segment {expected}")
