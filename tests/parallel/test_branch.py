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


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 1, 2]])
def test_a_sum_has_the_terms_of_what_is_differentiated(kept: list[int]) -> None:
    single = ParallelContext.single(torch.float64)
    columns = [*linears(single), *linears(single)[:1]]
    x = torch.randn(5, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    with tensor_parallel_branch(x * 2, columns, single) as entered:
        outputs = [entered.apply(column).sin() for column in columns]
    total = sum((outputs[number].sum() for number in kept), (entered.whole**2).sum())
    expected = sum((columns[number](x * 2).sin().sum() for number in kept), (x * 2).square().sum())
    leaves = [x, *(columns[number].weight for number in kept)]
    wanted = torch.autograd.grad(expected, leaves)
    torch.autograd.grad(total, leaves[1:], retain_graph=True)  # terms that nobody takes
    (alone,) = torch.autograd.grad(entered.whole.sum(), x, retain_graph=True)
    assert_close(alone, torch.full_like(x, 2))
    torch.autograd.grad(total, leaves[1:], retain_graph=True)
    for again in (True, False):
        for got, right in zip(torch.autograd.grad(total, leaves, retain_graph=again), wanted, strict=True):
            assert_close(got, right)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("passes", [1, 2])
def test_weights_wait_for_what_is_gathered_again(passes: int, twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.randn(2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sent = []

    class Gather:
        """Arrives when it is waited for."""

        def __init__(self, whole: Tensor, local: Tensor, **_: object) -> None:
            self.whole, self.local = whole.fill_(torch.nan), local
            sent.append(self)

        def wait(self) -> None:
            self.whole.copy_(torch.cat((self.local, other)))

    monkeypatch.setattr(branch.dist, "all_gather_into_tensor", Gather)
    monkeypatch.setattr(branch, "gather_to_tensor_parallel_region", lambda x, _: torch.cat((x, other)))
    config = ParallelConfig(tensor=2, sequence=True)
    with _fake_launch(2, 0), process_groups(config, device=torch.device("cpu")) as groups:
        parallel = ParallelContext(groups.tensor, torch.float64, sequence_parallel=True)
        columns, plain = linears(parallel), linears(parallel)
        x = torch.randn(2, 1, 6, dtype=torch.float64).requires_grad_()
        with tensor_parallel_branch(x, columns, parallel) as entered:
            outputs = [entered.apply(column) for column in columns]
            if twice:  # whose weight has its gradient where it is used, which does not wait
                outputs.append(entered.apply(columns[0]))
        of_all = torch.cat((x, other)).detach()
        same = [column(of_all) for column in [*plain, *plain[:twice]]]
        total, expected = (sum(output.sin().sum() for output in found) for found in (outputs, same))
        for number in range(passes):
            for found in (total, expected):
                found.backward(retain_graph=number < passes - 1)
    for first, second in zip(columns, plain, strict=True):
        assert_close(first.weight.grad, second.weight.grad)
    assert len(sent) == passes


def test_a_second_derivative_is_refused(parallel: ParallelContext) -> None:
    x = torch.randn(5, 1, 6, dtype=torch.float64).requires_grad_()
    for context in (parallel, ParallelContext.single(torch.float64)):
        (column, _) = linears(context)
        with tensor_parallel_branch(x, [column], context) as entered:
            total = entered.apply(column).sin().sum() + (x**3).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total, x, create_graph=True)


def test_a_hook_that_replaces_what_a_linear_takes_is_differentiated() -> None:
    single = ParallelContext.single(torch.float64)
    column, plain = linears(single)[0], linears(single)[0]
    x = torch.randn(5, 1, 6, dtype=torch.float64).requires_grad_()
    column.register_forward_pre_hook(lambda _, given: (given[0] * 3, *given[1:]))
    with tensor_parallel_branch(x, [column], single) as entered:
        (got,) = torch.autograd.grad(entered.apply(column).sin().sum(), x)
    (wanted,) = torch.autograd.grad(plain(x * 3).sin().sum(), x)
    assert_close(got, wanted)


def test_what_is_frozen_keeps_nothing_for_a_gradient_that_it_has_not() -> None:
    single = ParallelContext.single(torch.float64)
    columns = linears(single)
    x = torch.randn(5, 1, 6, dtype=torch.float64).requires_grad_()
    kept: list[Tensor] = []
    for column in columns:
        column.requires_grad_(False)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved),
        tensor_parallel_branch(x, columns, single) as entered,
    ):
        outputs = [entered.apply(column) for column in columns]
    assert [saved.data_ptr() for saved in kept] == [column.weight.data_ptr() for column in columns]
    torch.cat(outputs).sum().backward()
    assert_close(x.grad, torch.ones(5, 1, 8).double() @ sum(column.weight for column in columns))


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
