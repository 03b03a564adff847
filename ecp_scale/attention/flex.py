"""Segment attention by FlexAttention, a kernel that is compiled for the pattern and skips the blocks that it hides.

For GPUs. On a CPU it runs forward alone and uncompiled, which the tests use to check the pattern.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ecp_scale.attention.sdpa import KeyValue


def flex_segments(
    q: Tensor, key_value: KeyValue, first_length: int, segment_length: int, look_back: bool, window: int | None
) -> Tensor:
    """Attention of the last Nq positions of a chunk that begins on a segment border.

    Args:
        q: queries (B, H, Nq, E).
        key_value: keys, values and documents of the chunk's N positions.
        first_length: positions of the first segment.
        segment_length: those of every further one; the last may be shorter.
        look_back: whether segments see their left neighbours.
        window: how many positions a query sees at most, its own included.

    Returns:
        The attended values (B, H, Nq, E).
    """
    pattern = (q.shape[-2], key_value.positions, first_length, segment_length, look_back, window)
    if key_value.documents is None:
        blocks = _block_mask(pattern, q.device)
    else:
        blocks = _new_block_mask(pattern, q.device, key_value.documents)
    grouped = q.shape[1] != key_value.keys.shape[1]
    return _kernel(q.is_cuda)(q, key_value.keys, key_value.values, block_mask=blocks, enable_gqa=grouped)


@cache
def _kernel(compiled: bool) -> Any:
    # Imported here: it loads the compiler.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


@cache
def _block_mask(pattern: tuple[Any, ...], device: torch.device) -> Any:
    """Block mask of a pattern without documents, which is equal in every layer and step."""
    return _new_block_mask(pattern, device, None)


def _new_block_mask(pattern: tuple[Any, ...], device: torch.device, documents: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    n_query, n_key, first_length, segment_length, look_back, window = pattern

    def segment(position: Tensor) -> Tensor:
        return (position - first_length).div(segment_length, rounding_mode="floor")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + (n_key - n_query)
        seen = (key <= position) & (segment(position) - segment(key) <= int(look_back))
        if window is not None:
            seen = seen & (position - key < window)
        if documents is not None:
            seen = seen & (documents[batch, position] == documents[batch, key])
        return seen

    batch = None if documents is None else len(documents)
    return create_block_mask(visible, batch, None, n_query, n_key, device=device)
