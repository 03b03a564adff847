"""Norms whose parameters may be used on this rank's heads or positions alone."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ecp_scale.models.pointwise import (
    NORM_EPSILON,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    maybe_compile,
    rms_norm,
)
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import with_summed_gradient


class _Norm(nn.Module):
    """A norm over the last dimension; ``split``: ranks of the tensor-parallel group apply it to rows of their own."""

    functions: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]
    """The norm of x, and x + add with its norm; the parameters follow."""

    def __init__(self, width: int, parallel: ParallelContext, split: bool) -> None:
        super().__init__(width, eps=NORM_EPSILON, dtype=parallel.dtype)
        self.group, self.compiled = parallel.tp_group if split else None, parallel.compiled

    def forward(self, x: Tensor, add: Tensor | None = None) -> Any:
        """Normalise ``x``; the shape stays. With ``add``: the sum x + add, and its norm."""
        parameters = [with_summed_gradient(parameter, self.group) for parameter in self.parameters()]
        alone, after_sum = self.functions
        if add is None:
            return maybe_compile(alone, self.compiled)(x, *parameters)
        return maybe_compile(after_sum, self.compiled)(x, add, *parameters)


class RMSNorm(_Norm, nn.RMSNorm):
    """RMSNorm over the last dimension (arXiv 1910.07467)."""

    functions = (rms_norm, add_rms_norm)


class LayerNorm(_Norm, nn.LayerNorm):
    """LayerNorm over the last dimension (arXiv 1607.06450)."""

    functions = (layer_norm, add_layer_norm)


def norm(kind: str, width: int, parallel: ParallelContext) -> nn.Module:
    """The norm of a position of the residual stream."""
    return (LayerNorm if kind == "layernorm" else RMSNorm)(width, parallel, split=parallel.sequence_parallel)
