"""Segment attention as two dense calls for all segments at once: each with itself, and each with its left neighbour.

A flash kernel (arXiv 2205.14135) also returns the logarithm of the sum that normalises each row, by which the two are
weighed into one. Its backward kernel takes the rows' output and normaliser as arguments; given those of the whole, it
returns the gradients of each part of the whole. No scores are masked away that have been computed: n * 1.5m pairs, as
many as the pattern has.

Shapes as in ``ecp_scale.attention.sdpa``; S segments, m positions each.
"""

from typing import Any

import torch
from torch import Tensor

from ecp_scale.attention.sdpa import KeyValue, attend, join
from ecp_scale.precision import product_type

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_segments(q: Tensor, chunk: KeyValue, segment_length: int, look_back: bool = True) -> Tensor:
    """Segment attention on a CPU without window, documents and dropout.

    Args:
        q: queries (B, H, Nq, E) of all positions, or of all but the first segment.
        chunk: keys and values of the chunk's positions, two full segments at least; the last one may be shorter.
        segment_length: m.
        look_back: whether segments see their left neighbours.

    Returns:
        The attended values (B, H, Nq, E).
    """
    tail = chunk.positions % segment_length
    if not tail:
        return _FlashSegments.apply(q, chunk.keys, chunk.values, segment_length, look_back)
    full, last = q.split([q.shape[-2] - tail, tail], dim=-2)
    whole, open_segment = chunk.split([chunk.positions - tail, tail])
    left = whole.split([whole.positions - segment_length, segment_length])[1]
    out = _FlashSegments.apply(full, whole.keys, whole.values, segment_length, look_back)
    return torch.cat((out, attend(last, join(left, open_segment) if look_back else open_segment)), dim=-2)


def _segments(x: Tensor, m: int) -> Tensor:
    """(B, H, S * m, E) -> (S, B * H, m, E), in the type of its products.

    A view, but for the type, where positions are outermost in memory, as a linear leaves them.
    """
    return x.to(product_type(x)).unflatten(2, (-1, m)).permute(2, 0, 1, 3, 4).flatten(1, 2)


def _positions(x: Tensor, like: Tensor) -> Tensor:
    """(S, B * H, m, E) -> (B, H, S * m, E), in the type of ``like`` (B, ...)."""
    return x.unflatten(1, (len(like), -1)).permute(1, 2, 0, 3, 4).flatten(2, 3).to(like.dtype)


class _FlashSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, m: int, look_back: bool) -> Tensor:
        queries, keys, values = (_segments(x, m) for x in (q, k, v))
        own = len(keys) - len(queries)  # the first segment of keys that has queries
        out, normaliser = _forward(queries, keys[own:], values[own:], 0.0, True)
        seeing = 1 - own  # the first segment of queries with a left neighbour
        if look_back and len(queries) > seeing:
            left, of_left = _forward(queries[seeing:], keys[:-1], values[:-1], 0.0, False)
            whole = torch.logaddexp(normaliser[seeing:], of_left)
            share = (of_left - whole).exp_()[..., None].to(out.dtype)
            out[seeing:].lerp_(left, share)
            normaliser[seeing:] = whole
        attended = _positions(out, q)
        ctx.save_for_backward(q, k, v, attended, normaliser)
        ctx.m, ctx.look_back = m, look_back
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *operands, normaliser = ctx.saved_tensors
        queries, keys, values, out, gradient = (_segments(x, ctx.m) for x in (*operands, gradients[0]))
        own = len(keys) - len(queries)
        of_whole = (out, normaliser)
        of_q, of_k, of_v = _backward(gradient, queries, keys[own:], values[own:], *of_whole, 0.0, True)
        if own:  # keys that only their right neighbour sees
            of_k, of_v = (torch.cat((torch.zeros_like(x[:1]), x)) for x in (of_k, of_v))
        seeing = 1 - own
        if ctx.look_back and len(queries) > seeing:
            of_whole = (out[seeing:], normaliser[seeing:])
            left = _backward(gradient[seeing:], queries[seeing:], keys[:-1], values[:-1], *of_whole, 0.0, False)
            # add_, since += on a slice copies the sum onto itself once more.
            of_q[seeing:].add_(left[0])
            of_k[:-1].add_(left[1])
            of_v[:-1].add_(left[2])
        return *(_positions(x, operands[0]) for x in (of_q, of_k, of_v)), None, None
