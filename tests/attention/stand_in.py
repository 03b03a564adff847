"""A kernel with everything that FlashAttention on a GPU has, by dense products in any type and on any device."""

import itertools
import math

import torch
from torch import Tensor

from ecp_scale.attention.kernels import Lengths, Operands, Settings, State, Whole


class StandIn:
    """Lower-right causal masks, windows, and stretches of any length; counts its calls."""

    lower_right = True

    def __init__(self) -> None:
        self.calls = 0
        self.shapes: dict[int, torch.Size] = {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """As a flash kernel: output, normalisers, and a state that the backward pass must get back."""
        self.calls += 1
        state = (torch.tensor(self.calls),)
        self.shapes[self.calls] = q.shape
        if lengths is None:
            return (*_forward(q, k, v, causal, settings), state)
        parts = [_forward(*(x[None] for x in operands), causal, settings) for operands in _cut((q, k, v), lengths)]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([norm[0] for _, norm in parts], dim=1), state

    def backward(
        self,
        gradient: Tensor,
        operands: Operands,
        whole: Whole,
        causal: bool,
        settings: Settings,
        state: State,
        lengths: Lengths | None = None,
    ) -> Operands:
        """As a flash kernel: gradients of the operands."""
        (number,) = state
        assert self.shapes.pop(int(number)) == operands[0].shape  # once each, and that of its own call
        assert whole[1].is_contiguous()
        if lengths is None:
            return _backward(gradient, operands, whole, causal, settings)
        borders = lengths.of_queries.tolist()
        parts = []
        for (begin, end), cut in zip(itertools.pairwise(borders), _cut(operands, lengths), strict=True):
            rows = (whole[0][None, begin:end], whole[1][None, :, begin:end])
            found = _backward(gradient[None, begin:end], tuple(x[None] for x in cut), rows, causal, settings)
            parts.append([x[0] for x in found])
        of_q, of_k, of_v = (torch.cat(found) for found in zip(*parts, strict=True))
        return of_q, of_k, of_v


def _cut(operands: tuple[Tensor, Tensor, Tensor], lengths: Lengths) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Operands of every stretch, whose lengths must be what they say they are."""
    q, k, v = operands
    of_queries, of_keys = lengths.of_queries.diff().tolist(), lengths.of_keys.diff().tolist()
    assert max(of_queries) == lengths.most_queries
    assert max(of_keys) == lengths.most_keys
    assert lengths.of_queries.dtype == lengths.of_keys.dtype == torch.int32
    return list(zip(q.split(of_queries), k.split(of_keys), v.split(of_keys), strict=True))


def _scores(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor:
    """(C, Q, H, E) and (C, K, G, E) -> (C, H, Q, K)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("cqhe,ckhe->chqk", q, k) / math.sqrt(q.shape[-1])
    queries, keys = scores.shape[-2:]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = (distance < 0) & causal
    if window is not None:
        hidden = hidden | (distance >= window)
    return scores.masked_fill(hidden, -torch.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, settings.window)
    normalisers = scores.logsumexp(-1)
    weights = (scores - normalisers[..., None]).exp()
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("chqk,ckhe->cqhe", weights, v), normalisers


def _backward(
    gradient: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    whole: tuple[Tensor, Tensor],
    causal: bool,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = operands
    shared = q.shape[2] // k.shape[2]
    weights = (_scores(q, k, causal, settings.window) - whole[1][..., None]).exp()
    of_weights = torch.einsum("cqhe,ckhe->chqk", gradient, v.repeat_interleave(shared, dim=2))
    mean = (gradient * whole[0]).sum(-1).transpose(1, 2)
    of_scores = weights * (of_weights - mean[..., None]) / math.sqrt(q.shape[-1])
    of_q = torch.einsum("chqk,ckhe->cqhe", of_scores, k.repeat_interleave(shared, dim=2))
    of_k = torch.einsum("chqk,cqhe->ckhe", of_scores, q)
    of_v = torch.einsum("chqk,cqhe->ckhe", weights, gradient)
    return of_q, of_k.unflatten(2, (-1, shared)).sum(3), of_v.unflatten(2, (-1, shared)).sum(3)
