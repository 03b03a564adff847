"""How a branch of the residual block enters the tensor-parallel region, and how its backward pass leaves it.

Forward, every rank gathers the positions that its rows of the matrices need. Backward, the gradient of the positions is
a sum over the ranks: it is under way while the gradients of the weights are computed, which do not need it. Autograd
runs in reverse order, so that order is all there is to it: before the gather the graph has where the sum is waited for,
and where each weight enters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import ColumnLinear, gather_to_tensor_parallel_region
from ecp_scale.parallel.recompute import PASS
from ecp_scale.precision import product_type


class Branch:
    """All positions (n, b, D) of what enters a branch, and the linears that take it."""

    def __init__(self, whole: Tensor, weights: dict[ColumnLinear, "_Weight"]) -> None:
        self.whole = whole
        self._weights = weights

    def apply(self, linear: ColumnLinear, last: int | None = None) -> Tensor:
        """(n, b, D) -> (n, b, out/t), or of the ``last`` positions alone."""
        # A slice of everything is none, but has a backward pass that fills and adds a tensor.
        x = self.whole if last is None or last == len(self.whole) else self.whole[-last:]
        return linear(x) if linear not in self._weights else self._weights[linear].linear(x, linear.bias)


@contextmanager
def tensor_parallel_branch(x: Tensor, linears: Sequence[ColumnLinear], parallel: ParallelContext) -> Iterator[Branch]:
    """Enter the tensor-parallel region with x (n or n/t, b, D) for some linears, which are applied in the block.

    With sequence parallelism they keep this rank's positions for the backward pass, which gathers them again: kept
    whole, the inputs of both branches are two fifths of a layer's activations.
    """
    if parallel.tp_size == 1 or not torch.is_grad_enabled():
        yield Branch(gather_to_tensor_parallel_region(x, parallel), {})
        return
    message = _Message(parallel)
    local = _Await.apply(x, message)
    # ZeRO-3 has a weight whole in its own module's forward and backward alone.
    weights = {linear: _Weight(linear.weight) for linear in linears if not hasattr(linear.weight, "ds_id")}
    whole = _Gather.apply(local, message)
    # What is computed again keeps nothing, and one that is computed again is used at once.
    if not parallel.sequence_parallel or PASS.get().which != "only":
        yield Branch(whole, weights)
        return
    again = _GatheredAgain(x.detach(), whole, parallel)
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        yield Branch(whole, weights)


class _Message:
    """The sum over the tensor group of a gradient, under way."""

    def __init__(self, parallel: ParallelContext) -> None:
        self.parallel = parallel
        self.work: dist.Work | None = None
        self.kept: Tensor | None = None

    def start(self, gradient: Tensor) -> Tensor:
        """(n, b, D) to where the sum will be: (n, b, D), or this rank's part of it."""
        gradient, group = gradient.contiguous(), self.parallel.tp_group
        self.kept = gradient  # until it is sent
        if not self.parallel.sequence_parallel:
            self.work = dist.all_reduce(gradient, group=group, async_op=True)
            return gradient
        part = gradient.new_empty(len(gradient) // group.size(), *gradient.shape[1:])
        self.work = dist.reduce_scatter_tensor(part, gradient, group=group, async_op=True)
        return part

    def wait(self) -> None:
        """Until it is there."""
        assert self.work is not None
        self.work.wait()
        self.work = self.kept = None


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.message.wait()
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        whole = gather_to_tensor_parallel_region(x, message.parallel)
        return whole.view_as(whole) if whole is x else whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.message.start(gradients[0]), None


class _Weight:
    """A weight whose gradient is computed where it enters the graph, and not where it is used."""

    def __init__(self, weight: Tensor) -> None:
        self.operands: tuple[Tensor, Tensor] | None = None
        self.weight: Tensor = _Entering.apply(weight, self)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) -> (..., out)."""
        return _Linear.apply(x, self.weight, bias, self)


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, owner: _Weight) -> Tensor:
        ctx.owner = owner
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *placeholders: Tensor) -> tuple[Tensor, None]:
        gradient, x = ctx.owner.operands
        ctx.owner.operands = None
        product = gradient.flatten(0, -2).t() @ x.flatten(0, -2).to(gradient.dtype)
        return product.to(placeholders[0].dtype), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, owner: _Weight) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.of_bias = owner, None if bias is None else bias.dtype
        wide = product_type(x)
        bias = None if bias is None else bias.to(wide)
        return functional.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(product_type(x))
        ctx.owner.operands = gradient, x
        of_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype)
        of_bias = None if ctx.of_bias is None else gradient.flatten(0, -2).sum(0).to(ctx.of_bias)
        # Autograd wants something that looks like a gradient; this one takes no memory.
        return of_x, weight.new_zeros(()).expand_as(weight), of_bias, None


class _GatheredAgain:
    """What is saved of a gathered tensor, as a view of one that is gathered when it is needed, once for all."""

    def __init__(self, local: Tensor, whole: Tensor, parallel: ParallelContext) -> None:
        self.local, self.parallel = local, parallel
        self.storage = whole.untyped_storage()._cdata  # and not the tensor, which would live on
        self.waiting = 0
        self.whole: Tensor | None = None

    def pack(self, saved: Tensor) -> Any:
        if saved.untyped_storage()._cdata != self.storage:
            return saved
        self.waiting += 1
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.whole is None:
            with torch.no_grad():
                self.whole = gather_to_tensor_parallel_region(self.local, self.parallel)
        found = self.whole.as_strided(*packed)
        self.waiting -= 1
        if self.waiting <= 0:  # less than none where a graph is kept for a second pass
            self.whole = None
        return found
