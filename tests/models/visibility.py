"""Who sees whom in a layer of each architecture, position by position, from the definitions in its paper.

Shares no code with what it checks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ecp_scale.config import ModelConfig

See = Callable[[int, int], bool]


def sees(config: ModelConfig, head: int) -> See:
    """Whether the query at position i sees the key at j, in a layer that receives all n positions."""
    n, m = config.sequence_length, config.segment_length
    sizes = config.geometry
    context = n - sizes.latents
    half = 0 if head < config.heads // 2 else sizes.group_length // 2
    in_context: dict[str, See] = {
        "double_attention": lambda i, j: j < context,
        "compressed_double_attention": lambda i, j: j < context,
        "split_attention": lambda i, j: j < context and i // m == j // m,
    }
    if config.architecture in in_context:
        inside = in_context[config.architecture]
        return lambda i, j: inside(i, j) if i < context else j <= i
    causal: dict[str, See] = {
        "ecp": lambda i, j: j // m >= i // m - 1,
        "sliding_window": lambda i, j: j > i - sizes.window,
        "longlora": lambda i, j: (i + half) // sizes.group_length == (j + half) // sizes.group_length,
    }
    return lambda i, j: j <= i and causal.get(config.architecture, lambda i, j: True)(i, j)


def visible(config: ModelConfig, positions: int) -> Tensor:
    """``sees`` as a mask (heads, positions, positions)."""
    rows = [
        [[see(i, j) for j in range(positions)] for i in range(positions)]
        for see in (sees(config, head) for head in range(config.heads))
    ]
    return torch.tensor(rows)
