"""The residual block (paper section 3): attention and a feed-forward network, each after a normalisation.

Activations are (N, B, D): positions first, as Megatron-core's linears want them. Heads and hidden widths are this
rank's share of the tensor group.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from ecp_scale.attention import KeyValue, rotate
from ecp_scale.config import ModelConfig
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.models.linear import ColumnLinear, RowLinear, Shard, enter, leave
from ecp_scale.models.norms import LayerNorm, RmsNorm, norm
from ecp_scale.models.pointwise import fused, swiglu
from ecp_scale.models.rows import LayerCache, Rows
from ecp_scale.parallel.random import tensor_parallel_random
from ecp_scale.parallel.recompute import recomputed


class Block(nn.Module):
    """One residual block."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard) -> None:
        super().__init__()
        self.attention_norm = norm(config.norm, config.width, shard)
        self.attention = Attention(config, layer, shard)
        self.feed_forward_norm = norm(config.norm, config.width, shard)
        self.feed_forward = FeedForward(config, shard)

    def forward(self, x: Tensor, rows: Rows, cache: LayerCache | None) -> Tensor:
        """(N, B, D) -> (N', B, D); the pattern says which rows leave. With sequence parallelism both are shares."""
        residual = self.attention.pattern.residual(x, rows)
        x, normed = self.feed_forward_norm(residual, self.attention(self.attention_norm(x), rows, cache))
        return x + self.feed_forward(normed)


class Attention(nn.Module):
    """Projections around an attention pattern (paper section 3.1; docs/training.md lists the switches)."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.pattern = ARCHITECTURES[config.architecture](config, layer, shard)
        self.head_width = config.head_width
        self.segment_length = config.segment_length
        self.rotated = config.rotary == "every_layer" or layer == 0
        self.dropout = config.dropout
        self.query = ColumnLinear(config.width, config.width, False, shard)
        self.key = ColumnLinear(config.width, config.key_value_width, False, shard)
        self.value = None if config.tied_key_value else ColumnLinear(config.width, config.key_value_width, False, shard)
        self.query_norm = RmsNorm(self.head_width, shard, split=True) if config.qk_norm else nn.Identity()
        self.key_norm = RmsNorm(self.head_width, shard, split=True) if config.qk_norm else nn.Identity()
        self.key_value_norm = LayerNorm(self.head_width, shard, split=True) if config.key_value_norm else nn.Identity()
        self.output = RowLinear(config.width, config.width, config.bias, shard)
        self.first_output = None
        if config.has_first_projection:
            self.first_output = RowLinear(config.width, config.width, config.bias, shard)

    def forward(self, x: Tensor, rows: Rows, cache: LayerCache | None) -> Tensor:
        """(N, B, D) -> (N', B, D)."""
        x = enter(x, self.shard)
        asking = self.pattern.asking(x.shape[0])
        q, k = self.query(x[-asking:]), self.key(x)
        v = None if self.value is None else self.value(x)
        if self.training and self.shard.recompute == "selective":
            attended = recomputed(self._attend, q, k, v, rows, cache, random=self.dropout > 0)
        else:
            attended = self._attend(q, k, v, rows, cache)
        return self._project(attended, rows.start)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor | None, rows: Rows, cache: LayerCache | None) -> Tensor:
        """Projected queries, keys and values (N, B, H*E) to attended values (N', B, H*E)."""
        asking = q.shape[0]
        q, k = self.query_norm(self._heads(q)), self.key_norm(self._heads(k))
        if self.rotated:
            turn = fused(rotate, self.shard.compiled)
            q, k = turn(q, rows.last(asking).rotation), turn(k, rows.rotation)
        k = self.key_value_norm(k)
        key_value = KeyValue(k, k if v is None else self._heads(v), rows.documents)
        if cache is not None:
            attended = self.pattern.stream(q, key_value, cache)
        else:
            rate = self.dropout if self.training else 0.0
            with tensor_parallel_random() if rate else nullcontext():
                attended = self.pattern.attend(q, key_value, rate)
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).permute(1, 2, 0, 3)  # (N, B, H*E) -> (B, H, N, E)

    def _project(self, x: Tensor, start: int) -> Tensor:
        """(N, B, H*E) -> (N, B, D) of the rows that begin at position ``start``."""
        if self.first_output is None:
            return self.output(x)
        border = self._first_rows(start, x.shape[0])
        terms = torch.cat((self.first_output.term(x[:border]), self.output.term(x[border:])))
        out = leave(terms, self.shard)
        if self.output.bias is None:
            return out
        # Trap: every rank must give both biases a gradient, if only of zeros, or ZeRO's buckets disagree and hang.
        first = start + self.shard.rank * out.shape[0] * self.shard.sequence
        border = self._first_rows(first, out.shape[0])
        biases = (self.first_output.whole_bias(), border), (self.output.whole_bias(), out.shape[0] - border)
        return out + torch.cat([bias.expand(count, 1, -1) for bias, count in biases])

    def _first_rows(self, start: int, rows: int) -> int:
        """How many of the rows that begin at position ``start`` are of the first segment."""
        return min(max(self.segment_length - start, 0), rows)


class FeedForward(nn.Module):
    """Linear-GELU-Linear, or SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.dropout = config.dropout
        self.up = ColumnLinear(config.width, config.feed_forward_width, config.bias, shard)
        self.gate = None
        if config.activation == "swiglu":
            self.gate = ColumnLinear(config.width, config.feed_forward_width, config.bias, shard)
        self.down = RowLinear(config.feed_forward_width, config.width, config.bias, shard)

    def forward(self, x: Tensor) -> Tensor:
        """(N, B, D) -> (N, B, D)."""
        x = enter(x, self.shard)
        inputs = [self.up(x)] if self.gate is None else [self.up(x), self.gate(x)]
        if not self.training or self.shard.recompute == "full":
            return self.down(self._hidden(*inputs))
        return self.down(*inputs, of=self._hidden, random=self.dropout > 0)

    def _hidden(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden = gelu(up) if gate is None else fused(swiglu, self.shard.compiled)(up, gate)
        if self.dropout and self.training:
            with tensor_parallel_random():
                hidden = dropout(hidden, self.dropout)
        return hidden
