"""Segment attention by its definition, position by position. Shares no code with what it checks."""

import math

import torch
from torch import Tensor


def visible_positions(position: int, segment_length: int) -> list[int]:
    """Positions that a query at ``position`` may see."""
    segment = position // segment_length
    return [other for other in range(position + 1) if other // segment_length >= segment - 1]


def segment_attention_oracle(q: Tensor, k: Tensor, v: Tensor, segment_length: int) -> Tensor:
    """Attend from every position of q (B, H, N, E) over k, v (B, G, N, E)."""
    batch, heads, positions, width = q.shape
    per_group = heads // k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // per_group], v[b, h // per_group]
            for n in range(positions):
                seen = visible_positions(n, segment_length)
                scores = torch.stack([(q[b, h, n] * keys[j]).sum() / math.sqrt(width) for j in seen])
                weights = torch.exp(scores - scores.max().detach())
                weights = weights / weights.sum()
                rows.append(sum(weights[i] * values[j] for i, j in enumerate(seen)))
    return torch.stack(rows).view(batch, heads, positions, width)
