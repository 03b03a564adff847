"""Documents for a flash kernel: pieces, each what a segment and a document have in common, as stretches of any length.

A piece sees itself causally and, where it begins its segment, what its document left in the segment before: its keys
are one run of positions that ends where its queries do. So one call with lower-right causal masks is exact, windows and
dropout included. The keys of all pieces are gathered, at most twice as many as there are positions.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ecp_scale.attention.calls import Pattern
from ecp_scale.attention.kernels import Kernel, Lengths, Settings
from ecp_scale.attention.key_value import KeyValue

T = TypeVar("T")
FEWEST_QUERIES = 128
"""With fewer, as in a step of generation, a mask is made sooner than the pieces of documents are on the host."""
_MADE: Any = WeakTensorKeyDictionary()


def once_for(documents: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` made of these documents at its first call: the layers of a micro-batch share one tensor.

    The tensor must not be changed in place, and what is made must not hold on to it, as a view of it would.
    """
    made = _MADE.setdefault(documents, {})
    if what not in made:
        made[what] = make()
    return made[what]


def documents_on(documents: Tensor, device: torch.device) -> Tensor:
    """Documents where they are wanted; they are copied there once for all layers."""
    if documents.device == device:
        return documents
    return once_for(documents, device, lambda: documents.to(device, non_blocking=True))


class Pieces(NamedTuple):
    """Stretches of one packed call, and the rows (n * B + b) of the positions that it reads.

    ``queries`` is None where their rows are in order, as in a batch of one.
    """

    lengths: Lengths
    queries: Tensor | None
    keys: Tensor


def document_pieces(documents: Tensor, pattern: Pattern, device: torch.device) -> Pieces:
    """The pieces of a pattern, whose window is the kernel's to keep.

    Args:
        documents: number of the document (B, Nk) of every position; on the host, or the device is waited for.
        pattern: who sees whom.
        device: where the pieces are wanted.
    """
    n_query, _, segment_length, first_length, look_back, _ = pattern
    of_position = documents.cpu().numpy()
    batch, n_key = of_position.shape
    position = np.arange(n_key)
    number = (position + segment_length - first_length) // segment_length
    segment_begin = np.maximum(0, number * segment_length - segment_length + first_length)
    reach = np.maximum(0, segment_begin - np.where(number == 1, first_length, segment_length) * look_back)
    lengths_q, begins_k, lengths_k, rows_q = [], [], [], []
    for row in range(batch):
        new = np.ones(n_key, dtype=bool)
        new[1:] = of_position[row, 1:] != of_position[row, :-1]
        document_begin = np.maximum.accumulate(np.where(new, position, 0))
        begins = np.flatnonzero(new | (segment_begin == position) | (position == n_key - n_query))
        begins = begins[begins >= n_key - n_query]
        ends = np.append(begins[1:], n_key)
        first_key = np.maximum(document_begin[begins], reach[begins])
        lengths_q.append(ends - begins)
        lengths_k.append(ends - first_key)
        begins_k.append(first_key * batch + row)
        rows_q.append((position[:n_query]) * batch + row)
    counts_q, counts_k = np.concatenate(lengths_q), np.concatenate(lengths_k)
    borders_q, borders_k = (np.append(0, counts.cumsum()) for counts in (counts_q, counts_k))
    offsets = np.arange(borders_k[-1]) - np.repeat(borders_k[:-1], counts_k)
    rows_k = np.repeat(np.concatenate(begins_k), counts_k) + offsets * batch
    parts = [borders_q, borders_k, rows_k, *([np.concatenate(rows_q)] if batch > 1 else [])]
    # One copy to the device, from memory that it can read by itself.
    packed = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    if device.type == "cuda":
        packed = packed.pin_memory()
    of_queries, of_keys, keys, *queries = packed.to(device, non_blocking=True).split([len(part) for part in parts])
    lengths = Lengths(of_queries, of_keys, int(counts_q.max()), int(counts_k.max()))
    return Pieces(lengths, queries[0] if queries else None, keys)


def attend_by_pieces(
    q: Tensor, seen: KeyValue, pattern: Pattern, kernel: Kernel | None, settings: Settings, causal: bool = True
) -> Tensor | None:
    """Attend by a kernel that takes stretches of any length; None where a mask is better.

    Args:
        q: queries (B, H, Nq, E) of the last of the Nk positions of the keys.
        seen: keys, values, and documents of at least their positions.
        pattern: who sees whom.
        kernel: that serves documents, if there is one.
        settings: window and dropout.
        causal: False if a query sees all of its segment; it has as many keys as queries then, and no neighbour.

    Returns:
        The attended values (B, H, Nq, E).
    """
    keys, values, documents = seen
    if kernel is None or documents is None or q.shape[-2] < FEWEST_QUERIES:
        return None
    key = ("pieces", pattern, q.device)
    pieces = once_for(documents, key, lambda: document_pieces(documents[:, : pattern.n_key], pattern, q.device))
    return _FlashPieces.apply(q, keys, values, pieces, kernel, settings, causal)


class _FlashPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, kernel: Kernel, settings: Settings, causal: bool
    ) -> Tensor:
        operands = _gathered(q, k, v, pieces)
        out_THE, normalisers, ctx.state = kernel.forward(*operands, causal, settings, pieces.lengths)
        attended = _scattered(out_THE, q, pieces.queries)
        ctx.save_for_backward(q, k, v, attended, normalisers)
        ctx.pieces, ctx.kernel, ctx.settings, ctx.causal = pieces, kernel, settings, causal
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, attended, normalisers = ctx.saved_tensors
        pieces = ctx.pieces
        whole = _rows(attended, pieces.queries), normalisers
        of_q, of_k, of_v = ctx.kernel.backward(
            _rows(gradients[0], pieces.queries),
            _gathered(q, k, v, pieces),
            whole,
            ctx.causal,
            ctx.settings,
            ctx.state,
            pieces.lengths,
        )
        of_q = _scattered(of_q, q, pieces.queries)
        return of_q, _added(of_k, k, pieces.keys), _added(of_v, v, pieces.keys), None, None, None, None


def _gathered(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(q, pieces.queries), _rows(k, pieces.keys), _rows(v, pieces.keys)


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """(B, H, N, E) -> (T, H, E), some of the positions of all batch rows."""
    x_THE = x.permute(2, 0, 1, 3).flatten(0, 1)
    return x_THE if rows is None else x_THE.index_select(0, rows)


def _scattered(x_THE: Tensor, like: Tensor, rows: Tensor | None) -> Tensor:
    """(T, H, E) -> (B, H, N, E), every position once."""
    if rows is not None:
        x_THE = torch.empty_like(x_THE).index_copy_(0, rows.long(), x_THE)
    return x_THE.unflatten(0, (-1, len(like))).permute(1, 2, 0, 3)


def _added(x_THE: Tensor, like: Tensor, rows: Tensor) -> Tensor:
    """(T, H, E) -> (B, H, N, E), the sum of what each position is."""
    # At most two addends, so that their order changes nothing, not even in bf16.
    batch, heads, positions, width = like.shape
    found_THE = x_THE.new_zeros(positions * batch, heads, width).index_add_(0, rows, x_THE)
    return _scattered(found_THE, like, None)
