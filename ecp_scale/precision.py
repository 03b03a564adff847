"""The types of a run's weights and products, and products of bf16 on processors that have no instructions for them.

Trap: torch multiplies them there in a plain loop, hundreds of times as slow as in float32 (docs/performance.md). So the
operands are widened for the product, and the result is rounded, as the instructions do. Nothing else is kept wider, but
what attention with documents, windows or dropout keeps of a segment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ecp_scale.config import Config

_AS_ON_A_GPU = ContextVar("as_on_a_gpu", default=False)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types of the weights by the words of ``training.precision``."""


def weight_type(config: Config) -> torch.dtype:
    """The type of the weights in the forward pass of a run."""
    return DTYPES[config.training.precision]


def product_type(x: Tensor) -> torch.dtype:
    """The type in which products of ``x`` are computed: its own, or float32 where the processor cannot."""
    wide = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not is_on_a_gpu(x) and _widens()
    return torch.float32 if wide else x.dtype


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Compute meanwhile as on a GPU: nothing is widened, and pieces are as large as there."""
    token = _AS_ON_A_GPU.set(True)
    try:
        yield
    finally:
        _AS_ON_A_GPU.reset(token)


def is_on_a_gpu(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU, or what is computed is to be what a GPU computes."""
    return x.is_cuda or _AS_ON_A_GPU.get()


@cache
def _widens() -> bool:
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # what torch itself asks before each product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: x (..., in), weight (out, in) -> (..., out)."""
    if product_type(x) == x.dtype:
        return functional.linear(x, weight, bias)
    out = _WidenedLinear.apply(x, weight)
    return out if bias is None else out + bias


class _WidenedLinear(torch.autograd.Function):
    """Keeps its operands as they are for the backward pass, not widened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].float()
        of_weight = gradient.flatten(0, -2).t() @ x.float().flatten(0, -2)
        return (gradient @ weight.float()).to(x.dtype), of_weight.to(weight.dtype)
