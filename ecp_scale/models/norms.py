"""Norms whose parameters may be used on this rank's heads or positions alone."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ecp_scale.models.linear import Shard, summed_gradient
from ecp_scale.models.pointwise import (
    NORM_EPSILON,
    add_and_layer_norm,
    add_and_rms_norm,
    fused,
    layer_norm,
    rms_norm,
)


class _Norm(nn.Module):
    """Over the last dimension; ``split`` says that each rank of the tensor group has rows of its own."""

    functions: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]
    """Of x, and of x and a branch; then the parameters."""

    def __init__(self, width: int, shard: Shard, split: bool) -> None:
        super().__init__(width, eps=NORM_EPSILON, dtype=shard.dtype)
        self.group, self.compiled = shard.group if split else None, shard.compiled

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Any:
        """Normalise x; the shape stays. With a branch: x + branch, and that normalised."""
        parameters = [summed_gradient(parameter, self.group) for parameter in self.parameters()]
        alone, after_sum = self.functions
        if branch is None:
            return fused(alone, self.compiled)(x, *parameters)
        return fused(after_sum, self.compiled)(x, branch, *parameters)


class RmsNorm(_Norm, nn.RMSNorm):
    """arXiv 1910.07467."""

    functions = (rms_norm, add_and_rms_norm)


class LayerNorm(_Norm, nn.LayerNorm):
    """arXiv 1607.06450."""

    functions = (layer_norm, add_and_layer_norm)


def norm(kind: str, width: int, shard: Shard) -> nn.Module:
    """The norm of a position of the residual stream."""
    return (LayerNorm if kind == "layernorm" else RmsNorm)(width, shard, split=shard.sequence)
