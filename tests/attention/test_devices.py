"""Backends in the type and at the sizes in which they train, against float64; tests/gpu does the same on a GPU."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.attention import KeyValue, segment_attention
from ecp_scale.config import AttentionBackend
from tests.attention.oracle import random_documents

SEGMENT = 128


class Case(NamedTuple):
    """Positions, and what else there is; two query heads share a head of keys."""

    positions: int
    left: bool = False
    documents: bool = False
    window: int | None = None
    batch: int = 2


CASES = {
    "whole": Case(4 * SEGMENT),
    "ragged": Case(4 * SEGMENT - 30),
    "left": Case(2 * SEGMENT, left=True),
    "documents": Case(3 * SEGMENT, documents=True),
    "window": Case(4 * SEGMENT, window=100),
}
TOLERANCES = {torch.bfloat16: 0.01, torch.float32: 1e-5}
"""Of the norm: a number of bf16 is rounded by up to 2^-9 of it, and errors that are independent cancel in the norm."""


def attended_and_gradients(
    inputs: list[Tensor],
    left: list[Tensor] | None,
    documents: Tensor | None,
    backend: AttentionBackend,
    window: int | None = None,
) -> list[Tensor]:
    """What a chunk attends to, and the gradients of everything that it is computed from."""
    q, k, v, *beside = leaves = [x.detach().requires_grad_() for x in [*inputs, *(left or [])]]
    neighbour = KeyValue(*beside) if left else None
    out, _ = segment_attention(q, k, v, SEGMENT, neighbour, documents=documents, backend=backend, window=window)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def check_near_float64(device: str, backend: AttentionBackend, case: Case, dtype: torch.dtype, width: int) -> None:
    """Compare values and gradients with those of the definition in float64."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(case.batch, heads, case.positions, width) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    beside = (case.batch, 2, SEGMENT, width)
    left = [torch.randn(beside, generator=generator).to(dtype) for _ in range(2)] if case.left else None
    documents = random_documents(case.batch, case.positions, seed=2) if case.documents else None
    exact = attended_and_gradients(
        [x.double() for x in inputs], left and [x.double() for x in left], documents, "reference", case.window
    )
    found = attended_and_gradients(
        [x.to(device) for x in inputs],
        left and [x.to(device) for x in left],
        None if documents is None else documents.to(device),
        backend,
        case.window,
    )
    tolerance = TOLERANCES[dtype]
    for got, wanted in zip(found, exact, strict=True):
        assert got.dtype == dtype
        error = (got.double().cpu() - wanted).norm() / wanted.norm()
        assert error < tolerance
        assert_close(got.double().cpu(), wanted, rtol=5 * tolerance, atol=5 * tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_bf16_is_near_float64_forward_and_backward(backend: AttentionBackend, case: str) -> None:
    check_near_float64("cpu", backend, CASES[case], torch.bfloat16, width=64)
