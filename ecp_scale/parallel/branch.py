"""How a branch of the residual block enters the tensor-parallel region, and how its backward pass leaves it.

Forward, every rank gathers the positions that its rows of the matrices need. Backward, the gradient of the positions is
a sum over the ranks: it is under way while the gradients of the weights are computed, which do not need it. Of the
nodes that can run, autograd takes the one that was made last; so they are made in the order of wait, weights, gather.

Trap: that holds as long as nothing but the gather takes what the wait returns, which is in flight until then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import ColumnLinear, gather_to_tensor_parallel_region
from ecp_scale.parallel.recompute import PASS
from ecp_scale.precision import linear, product_type


class Branch:
    """All positions (n, b, D) of what enters a branch, and the linears that take it."""

    def __init__(self, whole: Tensor, weights: dict[ColumnLinear, "tuple[Tensor, _Operands]"]) -> None:
        self.whole = whole
        self._weights = weights

    def apply(self, column: ColumnLinear, last: int | None = None) -> Tensor:
        """(n, b, D) -> (n, b, out/t), or of the ``last`` positions alone."""
        # A slice of everything is none, but has a backward pass that fills and adds a tensor.
        x = self.whole if last is None or last == len(self.whole) else self.whole[-last:]
        weight, operands = self._weights.pop(column, (None, None))  # of one use; a second computes its own gradient
        return column(x) if weight is None else column(x, partial(_Linear.apply, operands, weight))


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
    weights = {}
    for column in linears:
        # ZeRO-3 has a weight whole in its own module's forward and backward alone.
        if column.weight.requires_grad and not hasattr(column.weight, "ds_id"):
            operands = _Operands()
            weights[column] = _Weight.apply(column.weight, operands), operands
    whole = _Gather.apply(local, message)
    # In the first pass of what is computed again nothing is kept, and in the second it is used at once.
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
    @once_differentiable
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
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.message.start(gradients[0]), None


class _Operands:
    """What the gradient of a weight is computed from, between the backward passes of its use and of itself."""

    def __init__(self) -> None:
        self.gradient_and_x: tuple[Tensor, Tensor] | None = None


class _Weight(torch.autograd.Function):
    """A weight whose gradient is computed here, where it enters the graph, and not where it is used."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, operands: _Operands) -> Tensor:
        ctx.operands = operands
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *placeholders: Tensor) -> tuple[Tensor, None]:
        gradient, x = ctx.operands.gradient_and_x
        ctx.operands.gradient_and_x = None
        product = gradient.flatten(0, -2).t() @ x.flatten(0, -2).to(gradient.dtype)
        return product.to(placeholders[0].dtype), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operands: _Operands, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.operands = operands
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(product_type(x))
        ctx.operands.gradient_and_x = gradient, x
        _, _, of_x_is_wanted, of_bias_is_wanted = ctx.needs_input_grad
        of_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype) if of_x_is_wanted else None
        of_bias = gradient.flatten(0, -2).sum(0).to(x.dtype) if of_bias_is_wanted else None
        # Autograd wants something that looks like the gradient of the weight; this takes no memory.
        return None, weight.new_zeros(()).expand_as(weight), of_x, of_bias


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
