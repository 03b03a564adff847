"""The residual block (paper section 3): attention and a feed-forward network, each after a normalisation.

Shape suffixes: N positions, B batch, D width of the residual stream, F of the hidden layer (local); H heads (local),
E head width. Positions come first in the residual stream, as Megatron-core's linears want them.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from ecp_scale.attention import KeyValue, rotate
from ecp_scale.config import ModelConfig
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.models.norms import LayerNorm, RMSNorm, norm
from ecp_scale.models.pointwise import maybe_compile, swiglu
from ecp_scale.models.positions import LayerCache, Positions
from ecp_scale.parallel.branch import tensor_parallel_branch
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import ColumnLinear, RowLinear, reduce_from_tensor_parallel_region
from ecp_scale.parallel.random import TENSOR_PARALLEL
from ecp_scale.parallel.recompute import recomputed


class Block(nn.Module):
    """One residual block."""

    def __init__(self, config: ModelConfig, layer: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.attention_norm = norm(config.norm, config.width, parallel)
        self.attention = Attention(config, layer, parallel)
        self.feed_forward_norm = norm(config.norm, config.width, parallel)
        self.feed_forward = FeedForward(config, parallel)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """(N, B, D) -> (N', B, D), the output rows of the attention pattern; local with sequence parallelism."""
        residual = self.attention.pattern.residual(x, positions)
        attended = self.attention(self.attention_norm(x), positions, cache)
        x, normed = self.feed_forward_norm(residual, add=attended)
        return x + self.feed_forward(normed)


class Attention(nn.Module):
    """Projections around an attention pattern (paper section 3.1; docs/training.md lists the switches)."""

    def __init__(self, config: ModelConfig, layer: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        self.pattern = ARCHITECTURES[config.architecture](config, layer, parallel)
        self.rotated = config.rotates(layer)
        self.query = ColumnLinear(config.width, config.width, False, parallel)
        self.key = ColumnLinear(config.width, config.key_value_width, False, parallel)
        self.value = (
            None if config.tied_key_value else ColumnLinear(config.width, config.key_value_width, False, parallel)
        )
        per_head = (config.head_width, parallel)
        self.query_norm = RMSNorm(*per_head, split=True) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(*per_head, split=True) if config.qk_norm else nn.Identity()
        self.key_value_norm = LayerNorm(*per_head, split=True) if config.key_value_norm else nn.Identity()
        self.output = RowLinear(config.width, config.width, config.bias, parallel)
        self.first_output = None
        if config.has_first_projection:
            self.first_output = RowLinear(config.width, config.width, config.bias, parallel)

    def forward(self, x_NBD: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """(N, B, D) -> (N', B, D)."""
        linears = [linear for linear in (self.query, self.key, self.value) if linear is not None]
        with tensor_parallel_branch(x_NBD, linears, self.parallel) as branch:
            q = branch.apply(self.query, last=self.pattern.query_rows(len(branch.whole)))
            k = branch.apply(self.key)
            v = None if self.value is None else branch.apply(self.value)
        del branch  # what it holds is gathered again where it is needed
        if self.training and self.parallel.recompute == "selective":
            attended = recomputed(self._attend, q, k, v, positions, cache, random=self.config.dropout > 0)
        else:
            attended = self._attend(q, k, v, positions, cache)
        return self._project(attended, positions.start)

    def _attend(
        self, q_NBF: Tensor, k_NBF: Tensor, v_NBF: Tensor | None, positions: Positions, cache: LayerCache | None
    ) -> Tensor:
        """Projected queries, keys and values (N, B, H * E) to attended values (N', B, H * E)."""
        q_BHNE, k_BHNE = self.query_norm(self._heads(q_NBF)), self.key_norm(self._heads(k_NBF))
        if self.rotated:
            turn = maybe_compile(rotate, self.parallel.compiled)
            q_BHNE = turn(q_BHNE, positions.last(len(q_NBF)).rotation)
            k_BHNE = turn(k_BHNE, positions.rotation)
        k_BHNE = self.key_value_norm(k_BHNE)
        v_BHNE = k_BHNE if v_NBF is None else self._heads(v_NBF)
        key_value = KeyValue(k_BHNE, v_BHNE, positions.documents)
        if cache is not None:
            out_BHNE = self.pattern.stream(q_BHNE, key_value, cache)
        else:
            rate = self.config.dropout if self.training else 0.0
            with TENSOR_PARALLEL.drawing(self.parallel.tp_size) if rate else nullcontext():
                out_BHNE = self.pattern.attend(q_BHNE, key_value, rate)
        return out_BHNE.permute(2, 0, 1, 3).flatten(2)

    def _heads(self, x_NBF: Tensor) -> Tensor:
        return x_NBF.unflatten(-1, (-1, self.config.head_width)).permute(1, 2, 0, 3)  # (B, H, N, E)

    def _project(self, x_NBF: Tensor, start: int) -> Tensor:
        """(N, B, H * E) -> (N, B, D), of positions from ``start`` on."""
        if self.first_output is None:
            return self.output(x_NBF)
        border = self._in_first_segment(start, len(x_NBF))
        terms = torch.cat((self.first_output.term(x_NBF[:border]), self.output.term(x_NBF[border:])))
        out = reduce_from_tensor_parallel_region(terms, self.parallel)
        if self.output.bias is None:
            return out
        # Trap: every rank must give both biases a gradient, if only of zeros, or ZeRO's buckets disagree and hang.
        first = start + self.parallel.tp_rank * out.shape[0] * self.parallel.sequence_parallel
        border = self._in_first_segment(first, out.shape[0])
        biases = (self.first_output.whole_bias(), border), (self.output.whole_bias(), out.shape[0] - border)
        return out + torch.cat([bias.expand(count, 1, -1) for bias, count in biases])

    def _in_first_segment(self, start: int, count: int) -> int:
        """How many of the ``count`` positions from ``start`` on are in the first segment."""
        return min(max(self.config.segment_length - start, 0), count)


class FeedForward(nn.Module):
    """Linear-GELU-Linear, or SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        self.up = ColumnLinear(config.width, config.feed_forward_width, config.bias, parallel)
        self.gate = None
        if config.activation == "swiglu":
            self.gate = ColumnLinear(config.width, config.feed_forward_width, config.bias, parallel)
        self.down = RowLinear(config.feed_forward_width, config.width, config.bias, parallel)

    def forward(self, x_NBD: Tensor) -> Tensor:
        """(N, B, D) -> (N, B, D)."""
        linears = [self.up] if self.gate is None else [self.up, self.gate]
        with tensor_parallel_branch(x_NBD, linears, self.parallel) as branch:
            inputs = [branch.apply(linear) for linear in linears]
        del branch
        if not self.training or self.parallel.recompute == "full":
            return self.down(self._hidden(*inputs))
        return self.down(*inputs, of=self._hidden, random=self.config.dropout > 0)

    def _hidden(self, up_NBF: Tensor, gate_NBF: Tensor | None = None) -> Tensor:
        hidden = gelu(up_NBF) if gate_NBF is None else maybe_compile(swiglu, self.parallel.compiled)(up_NBF, gate_NBF)
        if self.config.dropout and self.training:
            with TENSOR_PARALLEL.drawing(self.parallel.tp_size):
                hidden = dropout(hidden, self.config.dropout)
        return hidden
