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


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attend from q (B, H, Nq, E) over k, v (B, G, Nk, E) where ``visible`` (broadcast to B, H, Nq, Nk) says so."""
    per_group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(per_group, dim=1) for x in (k, v))
    scores = torch.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = torch.where(visible, scores, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bhke->bhqe", weights, v)


def same_document(documents: Tensor) -> Tensor:
    """Which pairs of positions lie in one document: (B, N) -> (B, 1, N, N)."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def random_documents(batch: int, positions: int, seed: int) -> Tensor:
    """Documents (B, N) of random lengths, numbered from 0."""
    begins = torch.rand(batch, positions, generator=torch.Generator().manual_seed(seed)) < 0.3
    return begins.long().cumsum(1)
