"""What a flash kernel for CUDA makes, in shapes alone: a plan is made without one, where masks would take its place."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from ecp_scale.attention import latent, pieces, sdpa, segment
from ecp_scale.attention.calls import Pattern
from ecp_scale.attention.kernels import FLASH_TYPES, Kernel, Lengths, Operands, Settings, State, Whole, kernel_for
from ecp_scale.attention.pieces import Pieces


class ShapesOfFlash:
    """Shapes and types of a flash kernel for CUDA, with nothing in them: those of FlashAttention-2, or of cuDNN's."""

    def __init__(self, lower_right: bool = True) -> None:
        self.lower_right = lower_right

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """One kernel."""
        *stretches, rows, heads, _ = q.shape
        normalisers = q.new_empty(*stretches, heads, rows, dtype=torch.float32)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), normalisers, ()

    def backward(
        self,
        gradient: Tensor,
        operands: Operands,
        whole: Whole,
        causal: bool,
        settings: Settings,
        state: State,
        lengths: Lengths | None = None,
    ) -> Operands:
        """One kernel."""
        of_q, of_k, of_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in operands)
        return of_q, of_k, of_v


@contextmanager
def flash_in_shapes() -> Iterator[None]:
    """Let documents and windows be served as on a GPU, in shapes; what a CPU's own kernel serves is left to it."""

    def served(q: Tensor, k: Tensor, settings: Settings, documents: bool, grain: int = 1) -> Kernel | None:
        own = kernel_for(q, k, settings, documents, grain)
        return ShapesOfFlash() if own is None and q.dtype in FLASH_TYPES else own

    with ExitStack() as stack:
        for module in (segment, sdpa, latent):
            stack.enter_context(mock.patch.object(module, "kernel_for", served))
        stack.enter_context(mock.patch.object(pieces, "document_pieces", most_pieces))
        yield


def most_pieces(documents: Tensor, pattern: Pattern, device: torch.device) -> Pieces:
    """As ``document_pieces``, in shapes, with as many keys as there may be: each its own, and its right neighbour's."""
    batch = documents.shape[0]
    segments = len(pattern.lengths)

    def numbers(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=device)

    of_keys = pattern.n_key + (pattern.n_query if pattern.look_back and segments > 1 else 0)
    borders = batch * segments + 1
    lengths = Lengths(numbers(borders), numbers(borders), pattern.segment_length, 2 * pattern.segment_length)
    return Pieces(lengths, numbers(batch * pattern.n_query) if batch > 1 else None, numbers(batch * of_keys))
