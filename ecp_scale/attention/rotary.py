"""Rotary positions (arXiv 2104.09864): adjacent pairs (2i, 2i+1) of a head rotate together."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every (position, pair), each (N, E/2), or (B, 1, N, E/2) where batch rows differ."""

    cos: Tensor
    sin: Tensor

    def at(self, index: Tensor | slice) -> "Rotation":
        """The rotations of some positions."""
        return Rotation(self.cos[..., index, :], self.sin[..., index, :])


def rotation(positions: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The rotation of each position: pair i turns by ``position * theta^(-2i / E)``.

    Args:
        positions: positions (N,), or (B, N) where batch rows differ; any integer type.
        head_width: E, even.
        theta: base of the frequencies; 10000 in the paper.
        dtype: type of the result, at least float32.
    """
    # float64 inside: at position 1e6 a float32 angle is wrong by up to 0.06.
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float64) / head_width
    angles = positions.to(torch.float64)[..., None] * theta**-exponents
    if angles.dim() == 3:
        angles = angles[:, None]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every adjacent pair of ``x`` (B, H, N, E); shape and type stay."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
