"""Attention by its definition: every score is made, in any type and on any device. What the kernels are held to."""

import math

import torch
from torch import Tensor


def reference_attention(
    q_BHQE: Tensor, k_BGKE: Tensor, v_BGKE: Tensor, visible: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, with scores of at least float32.

    Args:
        q_BHQE: queries.
        k_BGKE: keys; G divides H.
        v_BGKE: values.
        visible: who sees whom, broadcast to (B, H, Q, K); None means everybody.
        dropout: probability of dropping an attention weight.

    Returns:
        The attended values (B, H, Q, E).
    """
    wide = torch.promote_types(q_BHQE.dtype, torch.float32)
    q_BGRQE = q_BHQE.to(wide).unflatten(1, (k_BGKE.shape[1], -1))
    scores_BHQK = (q_BGRQE @ k_BGKE.to(wide)[:, :, None].mT).flatten(1, 2) / math.sqrt(q_BHQE.shape[-1])
    if visible is not None:
        scores_BHQK = scores_BHQK.masked_fill(~visible, -torch.inf)
    weights_BHQK = torch.dropout(scores_BHQK.softmax(-1), dropout, train=True)
    weights_BGRQK = weights_BHQK.unflatten(1, (k_BGKE.shape[1], -1))
    return (weights_BGRQK @ v_BGKE.to(wide)[:, :, None]).flatten(1, 2).to(q_BHQE.dtype)
