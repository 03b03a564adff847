"""bf16 products with and without instructions for them, against float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale import precision
from ecp_scale.attention import segment_attention
from ecp_scale.precision import linear, product_type


@pytest.fixture(params=[True, False], ids=["widened", "native"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(precision, "_widens", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_right_to_half_a_unit_of_bf16(bias: bool, widened: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 2, 16), (24, 16)] + [(24,)] * bias
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = linear(*inputs), linear(*exact_inputs)
    assert out.dtype == torch.bfloat16
    # One rounding of the sum: 2^-9 of it; a second one where the bias is added.
    assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)
    ones = torch.ones_like(out)
    wanted = torch.autograd.grad(exact, exact_inputs, ones.double())
    for got, true in zip(torch.autograd.grad(out, inputs, ones), wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert_close(got.double(), true, rtol=2**-7, atol=2**-6)


def test_only_bf16_on_a_cpu_is_widened(widened: bool) -> None:
    assert product_type(torch.zeros(1, dtype=torch.bfloat16)) == (torch.float32 if widened else torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        assert product_type(torch.zeros(1, dtype=dtype)) == dtype
    assert product_type(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


def kept_for_the_backward_pass(function: Callable[..., object], *inputs: Tensor) -> list[Tensor]:
    """What autograd saves of a call."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        function(*inputs)
    return kept


def test_operands_that_are_widened_are_kept_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_widens", lambda: True)
    x, weight = (torch.randn(4, 4).bfloat16().requires_grad_() for _ in range(2))
    assert [one.dtype for one in kept_for_the_backward_pass(linear, x, weight)] == [torch.bfloat16] * 2

    q, k, v = (torch.randn(1, 2, 24, 8).bfloat16().requires_grad_() for _ in range(3))
    kept = kept_for_the_backward_pass(partial(segment_attention, segment_length=8, backend="flash"), q, k, v)
    # Each row's normaliser is a sum of many, and one number beside a head's width of others.
    assert [one.dtype for one in kept if one.numel() == q.numel()] == [torch.bfloat16] * 4
    assert [one.numel() for one in kept if one.dtype == torch.float32] == [2 * 24]


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_segment_attention_in_bf16_is_near_float64(backend: str, widened: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    exact = [torch.randn(1, 2, 24, 8, generator=generator).bfloat16().double().requires_grad_() for _ in range(3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    got, wanted = (segment_attention(*x, 8, backend=backend)[0] for x in (rounded, exact))
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), wanted, rtol=0, atol=0.04)
    gradients = (torch.autograd.grad(out.sum(), x) for out, x in ((got, rounded), (wanted, exact)))
    for found, true in zip(*gradients, strict=True):
        assert_close(found.double(), true, rtol=0.05, atol=0.05)
