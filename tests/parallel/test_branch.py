"""Gradients of a branch under tensor parallelism, whose weights are differentiated apart; messages go nowhere."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.config import ParallelConfig
from ecp_scale.parallel import branch
from ecp_scale.parallel.branch import tensor_parallel_branch
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import process_groups
from ecp_scale.parallel.linear import ColumnLinear
from ecp_scale.planning.tracing import _fake_launch


@pytest.fixture
def parallel() -> Iterator[ParallelContext]:
    """The first of two ranks; the other adds nothing."""
    with _fake_launch(2, 0), process_groups(ParallelConfig(tensor=2), device=torch.device("cpu")) as groups:
        yield ParallelContext(groups.tensor, torch.float64)


def linears(parallel: ParallelContext) -> list[ColumnLinear]:
    """One without and one with a bias."""
    found = [ColumnLinear(6, 8, bias, parallel) for bias in (False, True)]
    for number, parameter in enumerate(parameter for linear in found for parameter in linear.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double()
    return found


def loss(x: Tensor, columns: list[ColumnLinear], parallel: ParallelContext) -> Tensor:
    """Of all positions by one, of the last two by the other, and again of all."""
    with tensor_parallel_branch(x * 2, columns, parallel) as entered:
        first, second, again = (
            entered.apply(columns[0]), entered.apply(columns[1], last=2), entered.apply(columns[0]),
        )  # fmt: skip
    return first.sin().sum() + (second * again[-2:]).sum()


def plain_loss(x: Tensor, columns: list[ColumnLinear]) -> Tensor:
    """The same by torch alone."""
    first, again = columns[0](x * 2), columns[0](x * 2)
    return first.sin().sum() + (columns[1]((x * 2)[-2:]) * again[-2:]).sum()


def gradients(x: Tensor, columns: list[ColumnLinear]) -> list[Tensor | None]:
    """Of everything."""
    return [x.grad, *(parameter.grad for linear in columns for parameter in linear.parameters())]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_those_of_plain_linears(passes: int, frozen: bool, parallel: ParallelContext) -> None:
    columns, plain = linears(parallel), linears(parallel)
    for first, second in (columns, plain):
        first.weight.requires_grad_(not frozen)
        second.bias.requires_grad_(not frozen)
    x = torch.randn(5, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    total, expected = loss(ours, columns, parallel), plain_loss(theirs, plain)
    for number in range(passes):
        for found in (total, expected):
            found.backward(retain_graph=number < passes - 1)
    for got, wanted in zip(gradients(ours, columns), gradients(theirs, plain), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert_close(got, wanted)


def test_a_second_derivative_is_refused(parallel: ParallelContext) -> None:
    x = torch.randn(5, 1, 6, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(loss(x, linears(parallel), parallel), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_graph_is_freed_without_the_collector(parallel: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Watched(branch._Operands):
        def __init__(self) -> None:
            super().__init__()
            made.append(weakref.ref(self))

    monkeypatch.setattr(branch, "_Operands", Watched)
    gc.disable()
    try:
        x = torch.randn(5, 1, 6, dtype=torch.float64).requires_grad_()
        loss(x, linears(parallel), parallel).backward()
        assert len(made) == 2
        assert all(reference() is None for reference in made)
    finally:
        gc.enable()
