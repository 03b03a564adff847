"""Segment attention by FlexAttention, a kernel that is compiled for the pattern and skips the blocks that it hides.

For GPUs, where the flash kernel cannot serve (float32, odd head widths). Its block mask is made by arithmetic on the
borders of blocks: torch's own way makes all pairs of positions, ten bytes each.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ecp_scale.attention.calls import Pattern
from ecp_scale.attention.key_value import KeyValue
from ecp_scale.attention.pieces import documents_on, once_for

BLOCK = 128
NARROWEST_HEAD = 16
"""The kernel refuses narrower ones, which are padded."""


def flex_attention(q: Tensor, key_value: KeyValue, pattern: Pattern) -> Tensor:
    """Attention of the last queries (B, H, Nq, E) of a chunk that begins on a segment border, without dropout."""
    documents = key_value.documents
    if documents is None:
        blocks = _plain_block_mask(pattern, q.device)
    else:
        blocks = once_for(
            documents,
            ("blocks", pattern, q.device),
            lambda: block_mask(pattern, q.device, documents_on(documents, q.device)),
        )
    width = q.shape[-1]
    lacking = (0, max(0, NARROWEST_HEAD - width))
    # Trap: where a view begins is a graph of its own, too.
    operands = (x.clone() if x.storage_offset() else x for x in (q, key_value.keys, key_value.values))
    operands = (pad(x, lacking) if lacking[1] else x for x in operands)
    grouped = q.shape[1] != key_value.keys.shape[1]
    attend = _kernel(q.is_cuda)
    named = {"enable_gqa": grouped, "scale": width**-0.5, "kernel_options": kernel_options(q.dtype, width)}
    return attend(*operands, block_mask=blocks, **named)[..., :width]


def flex_serves(q: Tensor) -> bool:
    """Whether the kernel is for so many queries (B, H, Nq, E): one block, or none, would be graphs of their own."""
    return q.shape[-2] >= 2 * BLOCK or not q.is_cuda


def kernel_options(dtype: torch.dtype, width: int) -> dict[str, int] | None:
    """Sizes of the kernel's blocks, where torch's own spill kilobytes: in float32 without TF32, heads of 64 to 128."""
    spills = dtype == torch.float32 and 64 <= width <= 128 and not torch.backends.cuda.matmul.allow_tf32
    return {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32} if spills else None


@cache
def _kernel(compiled: bool) -> Any:
    # Imported here: it loads the compiler.
    from torch.nn.attention.flex_attention import flex_attention

    # dynamic: else every length of a prompt compiles anew, and the ninth makes all scores.
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


@lru_cache(8)
def _plain_block_mask(pattern: Pattern, device: torch.device) -> Any:
    """Block mask of a pattern without documents, which is equal in every layer and step."""
    return block_mask(pattern, device)


def block_mask(pattern: Pattern, device: torch.device, documents: Tensor | None = None) -> Any:
    """The ``BlockMask`` of a pattern, from (Nq / 128) x (Nk / 128) comparisons.

    Args:
        pattern: who sees whom.
        device: where the mask is wanted.
        documents: number of the document (B, Nk) of every position, which never falls, on that device.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n_query, n_key, segment_length, first_length, look_back, window = pattern
    # Tensors, since a number that a compiled mask uses is a graph of its own.
    sizes = torch.tensor([n_key - n_query, first_length], dtype=torch.int32).to(device)

    def segment(position: Tensor) -> Tensor:
        return (position - sizes[1]).div(segment_length, rounding_mode="floor")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + sizes[0]
        seen = (key <= position) & (segment(position) - segment(key) <= int(look_back))
        if window is not None:
            seen = seen & (position - key < window)
        if documents is not None:
            seen = seen & (documents[batch, position] == documents[batch, key])
        return seen

    first_query, last_query = (x[:, None] for x in _borders(n_query, device))
    first_key, last_key = (x[None] for x in _borders(n_key, device))
    oldest, newest = first_query + (n_key - n_query), last_query + (n_key - n_query)
    most = n_key if window is None else window
    # The nearest pair of a block is its first query and last key, the farthest its last query and first key.
    near = (segment(oldest) - segment(last_key) <= int(look_back)) & (oldest - last_key < most)
    far = (segment(newest) - segment(first_key) <= int(look_back)) & (newest - first_key < most)
    whole = (last_query - first_query == BLOCK - 1) & (last_key - first_key == BLOCK - 1)
    every = (whole & far & (last_key <= oldest))[None, None]
    inside = last_key >= oldest  # holds a key of its own query, or later ones
    some = (first_key <= newest)[None, None]
    if documents is None:
        some = some & (inside | near)
    else:
        nearest = documents[:, oldest[:, 0]][:, :, None] == documents[:, last_key[0]][:, None, :]
        farthest = documents[:, newest[:, 0]][:, :, None] == documents[:, first_key[0]][:, None, :]
        some = some & (inside | (near & nearest))[:, None]
        every = every & farthest[:, None]
    blocks = (*_ordered(some & ~every), *_ordered(every))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(n_query, n_key))


def _borders(positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last position of every block."""
    first = torch.arange(0, positions, BLOCK, device=device)
    return first, (first + BLOCK - 1).clamp(max=positions - 1)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, Q, K) bool to how many are set in each row, and the columns, those that are set first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
