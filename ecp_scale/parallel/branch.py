"""How a branch of the residual block enters the tensor-parallel region, and how its backward pass leaves it.

Forward, every rank gathers the positions that its rows of the matrices need. Backward, the gradient of the positions is
a sum over the linears that take them, which each adds to inside its product, and over the ranks: that sum is under way
while the gradients of the weights are computed, which do not need it. Of the nodes that can run, autograd takes the one
that was made last; so they are made in the order of wait, weights, gather.

Trap: that holds as long as nothing but the gather takes what the wait returns, which is in flight until then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.gradient_sum import GradientSum, backward_pass
from ecp_scale.parallel.linear import ColumnLinear, gather_to_tensor_parallel_region
from ecp_scale.parallel.recompute import PASS
from ecp_scale.precision import linear, product_type


class Branch:
    """All positions (n, b, D) of what enters a branch, and the linears that take it."""

    def __init__(
        self,
        whole: Tensor,
        weights: dict[ColumnLinear, "tuple[Tensor, _Operands | None]"],
        total: GradientSum,
        again: "_GatheredAgain | None" = None,
    ) -> None:
        self.whole = whole
        self._weights, self._total, self._again = weights, total, again

    def apply(self, column: ColumnLinear, last: int | None = None) -> Tensor:
        """(n, b, D) -> (n, b, out/t), or of the ``last`` positions alone."""
        # A slice of everything is none, but has a backward pass that fills and adds a tensor.
        x = self.whole if last is None or last == len(self.whole) else self.whole[-last:]
        if column not in self._weights:
            return column(x)
        weight, operands = self._weights.pop(column)  # of one use; a second computes its own gradient

        def product(taken: Tensor, bias: Tensor | None) -> Tensor:
            # Not what a hook of the module has put in its place, whose gradient goes its way.
            total = self._total if taken is self.whole else None
            return _Linear.apply(operands, total, weight, taken, bias)

        with nullcontext() if self._again is None or operands is None else self._again.awaited_by(operands):
            return column(x, product)


@contextmanager
def tensor_parallel_branch(x: Tensor, linears: Sequence[ColumnLinear], parallel: ParallelContext) -> Iterator[Branch]:
    """Enter the tensor-parallel region with x (n or n/t, b, D) for some linears, which are applied in the block.

    With sequence parallelism they keep this rank's positions for the backward pass, which gathers them again: kept
    whole, the inputs of both branches are two fifths of a layer's activations.
    """
    total = GradientSum(x.dtype)
    if not torch.is_grad_enabled():
        yield Branch(gather_to_tensor_parallel_region(x, parallel), {}, total)
        return
    # ZeRO-3 has a weight whole in its own module's forward and backward alone.
    own = [column for column in linears if not hasattr(column.weight, "ds_id")]
    weights: dict[ColumnLinear, tuple[Tensor, _Operands | None]]
    if parallel.tp_size == 1:
        weights = {column: (column.weight, None) for column in own}
        yield Branch(_Gather.apply(x, None, total), weights, total)
        return
    message = _Message(parallel)
    local = _Await.apply(x, message)
    weights = {}
    for column in own:
        if column.weight.requires_grad:
            operands = _Operands()
            weights[column] = _Weight.apply(column.weight, operands), operands
    whole = _Gather.apply(local, message, total)
    # In the first pass of what is computed again nothing is kept, and in the second it is used at once.
    if not parallel.sequence_parallel or PASS.get().which != "only":
        yield Branch(whole, weights, total)
        return
    again = _GatheredAgain(x.detach(), whole, parallel.tp_group)
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        yield Branch(whole, weights, total, again)


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
    def forward(ctx: Any, x: Tensor, message: _Message | None, total: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)  # None is what the linears of ``total`` give
        whole = x if message is None else gather_to_tensor_parallel_region(x, message.parallel)
        ctx.message, ctx.total, ctx.shape = message, total, whole.shape
        return whole.view_as(whole) if whole is x else whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        whole = ctx.total.take(gradients[0], ctx.shape)
        return whole if ctx.message is None else ctx.message.start(whole), None, None


class _Operands:
    """What the gradient of a weight is computed from, between the backward passes of its use and of itself."""

    def __init__(self) -> None:
        self.gradient_and_x: tuple[Tensor, Tensor] | None = None
        self.again: _GatheredAgain | None = None
        """By which x is under way."""


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
        if ctx.operands.again is not None:
            ctx.operands.again.wait()
        return _of_weight(gradient, x).to(placeholders[0].dtype), None


def _of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    """(n, b, out) and (n, b, D) to the gradient of the weight, (out, D), in the type of the former."""
    return gradient.flatten(0, -2).t() @ x.flatten(0, -2).to(gradient.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operands: _Operands | None, total: GradientSum | None, weight: Tensor, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``operands`` is None where the gradient of the weight is computed here, ``total`` that of x alone."""
        _, _, of_weight_is_wanted, of_x_is_wanted, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight_is_wanted else None, weight if of_x_is_wanted else None)
        ctx.dtypes = x.dtype, weight.dtype, product_type(x)
        ctx.operands, ctx.total = operands, total
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Trap: ``once_differentiable`` sees what autograd is given, and not what goes through a sum.
            raise RuntimeError("a branch of a block has no second derivative: create_graph is for other models")
        x, weight = ctx.saved_tensors  # Trap: x may still be under way; ``_Weight`` waits for it.
        dtype, dtype_of_weight, dtype_of_products = ctx.dtypes
        gradient = gradients[0].to(dtype_of_products)
        _, _, of_weight_is_wanted, of_x_is_wanted, of_bias_is_wanted = ctx.needs_input_grad
        of_x = of_weight = None
        if of_x_is_wanted and ctx.total is not None:
            ctx.total.add(gradient, weight.to(gradient.dtype))
        elif of_x_is_wanted:
            of_x = (gradient @ weight.to(gradient.dtype)).to(dtype)
        if ctx.operands is not None:
            ctx.operands.gradient_and_x = gradient, x
            # Autograd wants something that looks like the gradient of the weight; this takes no memory.
            shape = gradient.shape[-1], x.shape[-1]
            of_weight = gradient.new_zeros((), dtype=dtype_of_weight).expand(shape)
        elif of_weight_is_wanted:
            of_weight = _of_weight(gradient, x).to(dtype_of_weight)
        of_bias = gradient.flatten(0, -2).sum(0).to(dtype) if of_bias_is_wanted else None
        return None, None, of_weight, of_x, of_bias


class _GatheredAgain:
    """What is saved of a gathered tensor, as a view of one that is gathered when it is needed, once for all."""

    def __init__(self, local: Tensor, whole: Tensor, group: ProcessGroup) -> None:
        self.local, self.group = local, group
        self.storage = whole.untyped_storage()._cdata  # and not the tensor, which would live on
        self.uses = self.waiting = 0
        self.backward_pass = -1
        self.whole: Tensor | None = None
        self.work: dist.Work | None = None
        self.is_awaited = False

    @contextmanager
    def awaited_by(self, operands: _Operands) -> Iterator[None]:
        """What is saved meanwhile is not read before ``operands`` has waited for it: it may arrive after ``unpack``."""
        operands.again, self.is_awaited = self, True
        try:
            yield
        finally:
            self.is_awaited = False

    def pack(self, saved: Tensor) -> Any:
        if saved.untyped_storage()._cdata != self.storage:
            return saved
        self.uses += 1
        return (saved.shape, saved.stride(), saved.storage_offset()), self.is_awaited

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        view, is_awaited = packed
        if (this := backward_pass()) != self.backward_pass:  # what one has left that did not want all gradients
            self.whole, self.waiting, self.backward_pass = None, self.uses, this
            self.wait()
        if self.whole is None:
            shape = len(self.local) * self.group.size(), *self.local.shape[1:]
            self.whole = self.local.new_empty(shape)
            # As Megatron's gather, but not waited for: the gradient of the positions is computed without it.
            local = self.local.contiguous()
            self.work = dist.all_gather_into_tensor(self.whole, local, group=self.group, async_op=True)
        if not is_awaited:
            self.wait()
        found = self.whole.as_strided(*view)
        self.waiting -= 1
        if not self.waiting:
            self.whole = None
        return found

    def wait(self) -> None:
        """Until it is there, if it has not been waited for."""
        if self.work is not None:
            self.work.wait()
            self.work = None
