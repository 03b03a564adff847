"""Segment attention by a flash kernel: no mask, no compiler, no operand copied, in memory linear in the length.

Shapes: N positions outermost, as a linear leaves them; H heads, batch and heads folded, so that grouped heads stay
grouped; E head width. Otherwise as in ``ecp_scale.attention.key_value``.
"""

from typing import Any

import torch
from torch import Tensor

from ecp_scale.attention.calls import Call
from ecp_scale.attention.kernels import Kernel, Settings
from ecp_scale.precision import product_type


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, calls: tuple[Call, ...], kernel: Kernel, settings: Settings
) -> Tensor:
    """Queries (B, H, Nq, E) of the last positions of keys and values (B, G, Nk, E) to attended values (B, H, Nq, E)."""
    return _Flash.apply(q, k, v, calls, kernel, settings)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: tuple[Call, ...], kernel: Kernel, settings: Settings
    ) -> Tensor:
        q_NHE, k_NHE, v_NHE = (_rows(x) for x in (q, k, v))
        views = _Views(len(q_NHE), len(k_NHE), q_NHE.shape[1])
        out, states = _Filled(q_NHE.shape), []
        normalisers: Tensor | None = None
        for call in calls:
            operands = views.queries(q_NHE, call), views.keys(k_NHE, call), views.keys(v_NHE, call)
            part, of_part, state = kernel.forward(*operands, call.causal, settings)
            states.append(state)
            if normalisers is None:
                normalisers = of_part.new_empty(q_NHE.shape[0] * q_NHE.shape[1])
            of_rows = views.normalisers(normalisers, call)
            if call.own:
                out.put(call.first_query - views.first, part)
                of_rows.copy_(of_part)
            else:
                torch.logaddexp(of_rows, of_part, out=of_rows)
                share = (of_part - of_rows).exp_().transpose(1, 2).unsqueeze(-1).to(part.dtype)
                views.queries(out.x, call).lerp_(part, share)
        attended = _heads(out.x, q)
        ctx.save_for_backward(q, k, v, attended, normalisers)
        ctx.calls, ctx.kernel, ctx.settings, ctx.states = calls, kernel, settings, states
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, attended, normalisers = ctx.saved_tensors
        q_NHE, k_NHE, v_NHE, out_NHE, gradient_NHE = (_rows(x) for x in (q, k, v, attended, gradients[0]))
        views = _Views(len(q_NHE), len(k_NHE), q_NHE.shape[1])
        of_q, of_k, of_v = (_Filled(x.shape) for x in (q_NHE, k_NHE, v_NHE))
        for call, state in zip(ctx.calls, ctx.states, strict=True):
            operands = views.queries(q_NHE, call), views.keys(k_NHE, call), views.keys(v_NHE, call)
            whole = views.queries(out_NHE, call), views.normalisers(normalisers, call)
            gradient = views.queries(gradient_NHE, call)
            parts = ctx.kernel.backward(gradient, operands, whole, call.causal, ctx.settings, state)
            first = call.first_query - views.first
            of_q.put(first, parts[0]) if call.own else of_q.add(first, parts[0])
            for found, part in ((of_k, parts[1]), (of_v, parts[2])):
                if call.own:
                    found.put(call.first_key + call.left, part.narrow(1, call.left, call.own))
                if call.left:
                    found.add(call.first_key, part.narrow(1, 0, call.left))
        return *(_heads(found.x, x) for found, x in ((of_q, q), (of_k, k), (of_v, v))), None, None, None


class _Views:
    """Views of what a call works on, each made at once: on a GPU the host's time for views is a step's time too."""

    def __init__(self, n_query: int, n_key: int, heads: int) -> None:
        self.first, self.heads = n_key - n_query, heads

    def queries(self, x_NHE: Tensor, call: Call) -> Tensor:
        """(C, Q, H, E) of what has a row per query."""
        return _stretches(x_NHE, call.first_query - self.first, call.stretches, call.queries, call.queries)

    def keys(self, x_NHE: Tensor, call: Call) -> Tensor:
        """(C, K, H, E) of what has a row per key; stretches overlap where each has its neighbour's."""
        return _stretches(x_NHE, call.first_key, call.stretches, call.left + call.own, call.queries)

    def normalisers(self, all_of_them: Tensor, call: Call) -> Tensor:
        """(C, H, Q), contiguous as kernels want them: rows of a stretch lie together, by heads."""
        rows = call.queries
        shape = (call.stretches, self.heads, rows)
        return all_of_them.as_strided(shape, (self.heads * rows, rows, 1), (call.first_query - self.first) * self.heads)


def _stretches(x_NHE: Tensor, first: int, count: int, length: int, step: int) -> Tensor:
    """(C, length, H, E): stretches of rows (N, H, E), each ``step`` rows after the one before."""
    assert first >= 0
    assert first + (count - 1) * step + length <= len(x_NHE)  # as_strided reads on without a word
    row, head, element = x_NHE.stride()
    shape = (count, length, *x_NHE.shape[1:])
    return x_NHE.as_strided(shape, (step * row, row, head, element), x_NHE.storage_offset() + first * row)


class _Filled:
    """A tensor (N, H, E) that is filled from parts (C, n, H, E); a part that is all of it is taken and not copied."""

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape
        self._x: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The tensor."""
        assert self._x is not None
        return self._x

    def put(self, first: int, part: Tensor) -> None:
        """Set the rows from ``first`` on; what lies before the first ones that are put is zero."""
        rows = part.shape[0] * part.shape[1]
        if self._x is None and rows == self._shape[0]:
            self._x = part.flatten(0, 1)
            return
        if self._x is None:
            self._x = part.new_empty(self._shape)
            if first:
                self._x.narrow(0, 0, first).zero_()
        self._view(first, part).copy_(part)

    def add(self, first: int, part: Tensor) -> None:
        """Add to the rows from ``first`` on, which have been set."""
        # add_, since += on a slice copies the sum onto itself once more.
        self._view(first, part).add_(part)

    def _view(self, first: int, part: Tensor) -> Tensor:
        return _stretches(self.x, first, part.shape[0], part.shape[1], part.shape[1])


def _rows(x: Tensor) -> Tensor:
    """(B, H, N, E) -> (N, B * H, E), in the type of its products; else a view where positions are outermost."""
    return x.to(product_type(x)).permute(2, 0, 1, 3).flatten(1, 2)


def _heads(x_NHE: Tensor, like: Tensor) -> Tensor:
    """(N, B * H, E) -> (B, H, N, E), in the type of ``like`` (B, ...)."""
    return x_NHE.unflatten(1, (len(like), -1)).permute(1, 2, 0, 3).to(like.dtype)
