"""Attention by torch's scaled_dot_product_attention, of queries over keys: every pattern, by a mask where it must be.

Shapes as in ``ecp_scale.attention.key_value``; Nq queries, of the last of Nk positions.
"""

import itertools
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ecp_scale.attention.calls import Call, Pattern
from ecp_scale.attention.flash import flash_attention
from ecp_scale.attention.kernels import Settings, kernel_for
from ecp_scale.attention.key_value import KeyValue, join
from ecp_scale.attention.pieces import attend_by_pieces, documents_on, once_for
from ecp_scale.attention.reference import reference_attention
from ecp_scale.config import AttentionBackend
from ecp_scale.precision import product_type

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for dropout and masks. Trap: cuDNN's, which torch prefers on Hopper, rounds dropout to sixteenths, and with a
mask has given wrong gradients without a word (torch 2.11 on an H100, after calls of other shapes)."""


def attend(
    q: Tensor,
    key_value: KeyValue,
    *,
    causal: bool = True,
    window: int | None = None,
    dropout: float = 0.0,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Attend from the last Nq of the Nk positions that ``key_value`` covers.

    A causal mask is thus aligned to the lower right corner. Every query sees at least its own position.

    Args:
        q: queries (B, H, Nq, E), Nq <= Nk.
        key_value: keys, values and documents of Nk positions; with documents, a query sees its own document alone.
        causal: whether a query is blind to the positions after its own.
        window: of a causal pattern, how many positions a query sees at most, its own included.
        dropout: probability of dropping an attention weight.
        backend: how it is computed.

    Returns:
        The attended values (B, H, Nq, E).
    """
    n_query, n_key = q.shape[-2], key_value.positions
    keys, values, documents = key_value
    window = None if window is None or window >= n_key else window
    plain = window is None and documents is None
    causal = causal and n_query > 1
    square = plain and (not causal or n_query == n_key)
    settings = Settings(window, dropout)
    # Of kernels that need no mask, torch chooses the best where nothing is dropped.
    kernel = None if backend in ("sdpa", "reference") else kernel_for(q, keys, settings, documents is not None)
    if kernel is not None and kernel.lower_right and documents is None and (dropout or not square):
        call = Call(n_key - n_query, n_query, 0, 0, n_key, causal or window is not None)
        return flash_attention(q, keys, values, (call,), kernel, settings)
    if causal:
        pattern = Pattern(n_query, n_key, n_key, n_key, look_back=False, window=window)
        attended = attend_by_pieces(q, key_value, pattern, kernel, settings)
        if attended is not None:
            return attended
    mask = None if square else visible(n_query, n_key, causal, window, documents, q.device)
    if backend == "reference":
        if mask is None and causal:
            mask = visible(n_query, n_key, True, None, None, q.device)
        return reference_attention(q, keys, values, mask, dropout)
    wide = product_type(q)
    if mask is not None and q.is_cuda and q.shape[1] != keys.shape[1]:
        # Trap: of the kernels that are left for masks, only the one that makes all scores takes grouped heads.
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    with sdpa_kernel(WITHOUT_CUDNN) if q.is_cuda and (dropout or mask is not None) else nullcontext():
        attended = scaled_dot_product_attention(
            q.to(wide),
            keys.to(wide),
            values.to(wide),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
    return attended.to(q.dtype)


def visible(
    n_query: int, n_key: int, causal: bool, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """Who sees whom: (Nq, Nk), or (B, 1, Nq, Nk) with documents, for whose layers it is made once."""
    if documents is not None:
        asked = ("visible", n_query, n_key, causal, window, device)
        return once_for(documents, asked, lambda: _visible(n_query, n_key, causal, window, documents, device))
    return _visible(n_query, n_key, causal, window, None, device)


def _visible(
    n_query: int, n_key: int, causal: bool, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    behind = n_key - n_query
    seen = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(behind)
    if window is not None:
        seen = seen.triu(behind - window + 1)
    if documents is not None:
        documents = documents_on(documents, device)
        seen = seen & (documents[:, behind:, None] == documents[:, None, :])[:, None]
    return seen


def attend_by_segment(
    q: Tensor,
    segments: list[KeyValue],
    look_back: bool,
    settings: Settings,
    backend: AttentionBackend,
) -> list[Tensor]:
    """Segment attention by one call per segment; the arguments are those of ``segment_attention``.

    Args:
        q: queries (B, H, Nq, E) of the last Nq positions of the segments.
        segments: keys, values and documents of every segment.
        look_back: whether segments see their left neighbours.
        settings: window and dropout.
        backend: how each is computed.

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
            outputs.append(attend(queries, seen, window=settings.window, dropout=settings.dropout, backend=backend))
    return outputs
