"""Backends in the type and at the sizes in which they train, on every device that is here, against float64."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.attention import KeyValue, segment_attention
from ecp_scale.config import AttentionBackend
from tests.attention.oracle import random_documents

SEGMENT = 128
CASES: dict[str, tuple[int, bool, bool]] = {
    "whole": (4 * SEGMENT, False, False),
    "ragged": (4 * SEGMENT - 30, False, False),
    "left": (2 * SEGMENT, True, False),
    "documents": (3 * SEGMENT, False, True),
}
"""Positions, whether there is a left segment, whether there are documents."""


def attended_and_gradients(
    inputs: list[Tensor], left: list[Tensor] | None, documents: Tensor | None, backend: AttentionBackend
) -> list[Tensor]:
    """What a chunk attends to, and the gradients of everything that it is computed from."""
    leaves = [x.detach().requires_grad_() for x in [*inputs, *(left or [])]]
    neighbour = KeyValue(*leaves[3:]) if left else None
    out, _ = segment_attention(*leaves[:3], SEGMENT, neighbour, documents=documents, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "sdpa"), ("cpu", "flash"), ("cuda", "sdpa"), ("cuda", "flash"), ("cuda", "flex")]
)
def test_bf16_is_near_float64_forward_and_backward(device: str, backend: AttentionBackend, case: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch finds none")
    positions, with_left, with_documents = CASES[case]
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, positions, 64), (2, 2, positions, 64), (2, 2, positions, 64)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    left = [torch.randn((2, 2, SEGMENT, 64), generator=generator).bfloat16() for _ in range(2)] if with_left else None
    documents = random_documents(2, positions, seed=2) if with_documents else None
    exact = attended_and_gradients([x.double() for x in inputs], left and [x.double() for x in left], documents, "sdpa")
    found = attended_and_gradients(
        [x.to(device) for x in inputs],
        left and [x.to(device) for x in left],
        None if documents is None else documents.to(device),
        backend,
    )
    for got, wanted in zip(found, exact, strict=True):
        # bf16 rounds each number by up to 2^-9 of it, and errors that are independent cancel in the norm.
        assert got.dtype == torch.bfloat16
        error = (got.double().cpu() - wanted).norm() / wanted.norm()
        assert error < 0.01
        assert_close(got.double().cpu(), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
