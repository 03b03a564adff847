"""What torch.compile makes of a pointwise function, in shapes alone: a kernel per direction, which keeps its inputs.

A plan is made without a GPU to compile for; run as it is, the function would keep what a compiler does not.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from ecp_scale.models import blocks, loss, norms

MODULES = (blocks, norms, loss)
"""Those that call ``maybe_compile``."""


class Watch(Protocol):
    """Is told of kernels."""

    def one_kernel(self) -> AbstractContextManager[Any]:
        """Entered for each; what torch is asked for inside is the kernel's."""

    def count(self, tensors: Any) -> None:
        """Told what it reads and writes."""


class Unwatched:
    """Is told, and does nothing."""

    def one_kernel(self) -> AbstractContextManager[Any]:
        """See ``Watch``."""
        return nullcontext()

    def count(self, tensors: Any) -> None:
        """See ``Watch``."""


@contextmanager
def compiled_in_shapes(watch: Watch | None = None) -> Iterator[None]:
    """Let every function that goes through ``maybe_compile`` be such kernels."""

    def maybe_compile(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
        return lambda *inputs: _run(function, inputs, watch or Unwatched())

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "maybe_compile", maybe_compile))
        yield


def _run(function: Callable[..., Any], inputs: tuple[Any, ...], watch: Watch) -> Any:
    with watch.one_kernel(), torch.no_grad():
        outputs = function(*tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), inputs))
    flat, structure = torch.utils._pytree.tree_flatten(outputs)
    return tree_unflatten(_Kernel.apply(flat, watch, *tree_leaves(inputs)), structure)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: list[Tensor], watch: Watch, *inputs: Any) -> tuple[Tensor, ...]:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.watch, ctx.wanted = watch, ctx.needs_input_grad[2:]
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
        found = tuple(torch.empty(x.shape, dtype=x.dtype, device=tensors[0].device) for x in outputs)
        watch.count((tensors, found))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if is_tensor else None for is_tensor in ctx.is_tensor]
        with ctx.watch.one_kernel():
            of_inputs = [
                torch.empty_like(x) if wanted and x is not None else None
                for x, wanted in zip(inputs, ctx.wanted, strict=True)
            ]
        ctx.watch.count((inputs, gradients, of_inputs))
        return None, None, *of_inputs
