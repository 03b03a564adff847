"""Chains of operations on single positions, each of which ``training.compile`` turns into one kernel per direction.

Without that they are several passes over memory, which is what they cost: none computes much.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NORM_EPSILON = 1e-5

Function = Callable[..., Any]


def maybe_compile(function: Function, compiled: bool) -> Function:
    """The function, or the kernel that is compiled for it at its first call; one for all layers."""
    return _compiled(function) if compiled else function


@cache
def _compiled(function: Function) -> Function:
    return torch.compile(function)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467)."""
    return functional.rms_norm(x, weight.shape, weight, NORM_EPSILON)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension (arXiv 1607.06450)."""
    return functional.layer_norm(x, weight.shape, weight, bias, NORM_EPSILON)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x + branch, and its RMSNorm."""
    total = x + branch
    return total, rms_norm(total, weight)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x + branch, and its LayerNorm."""
    total = x + branch
    return total, layer_norm(total, weight, bias)


def swiglu(up: Tensor, gate: Tensor) -> Tensor:
    """The hidden layer of SwiGLU (arXiv 2002.05202)."""
    return functional.silu(gate) * up


def losses_and_gradients(
    scores: Tensor, targets: Tensor, counts: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihoods of targets (T,), log Z of scores (T, V), and the gradients by scores, in their type.

    The gradients are those of the sum of the losses, each with ``z_loss`` * (log Z)^2, of what ``counts`` (T,) names.
    Scores of rows that are none are -inf.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    log_z = torch.logsumexp(wide, -1)
    is_target = torch.arange(scores.shape[1], device=scores.device) == targets[:, None]
    of_target = torch.where(is_target, wide, 0.0).sum(-1)
    shares = (wide - log_z[:, None]).exp()
    if z_loss:
        shares = shares * (1 + 2 * z_loss * log_z[:, None])
    gradients = (shares - is_target.to(wide.dtype)) * counts[:, None]
    return log_z - of_target, log_z, gradients.to(scores.dtype)
