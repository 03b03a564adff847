"""The residual block (paper section 3): attention and a feed-forward network, each after a normalisation.

Activations are (N, B, D): positions first, as Megatron-core's linears want them. Heads and hidden widths are this
rank's share of the tensor group.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, layer_norm, rms_norm, silu

from ecp_scale.attention import KeyValue, rotate
from ecp_scale.config import ModelConfig
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.models.linear import ColumnLinear, RowLinear, Shard, shared_by_heads
from ecp_scale.models.rows import LayerCache, Rows
from ecp_scale.parallel.random import tensor_parallel_random

NORM_EPSILON = 1e-5


def norm(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    """LayerNorm or RMSNorm over the last dimension, the same on every rank of a tensor group."""
    layer = nn.LayerNorm if kind == "layernorm" else nn.RMSNorm
    return layer(width, eps=NORM_EPSILON, dtype=dtype)


class HeadRmsNorm(nn.RMSNorm):
    """RMSNorm over every head, with one weight for all heads of the layer."""

    def __init__(self, width: int, shard: Shard) -> None:
        super().__init__(width, eps=NORM_EPSILON, dtype=shard.dtype)
        self.group = shard.group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the shape stays."""
        return rms_norm(x, self.normalized_shape, shared_by_heads(self.weight, self.group), self.eps)


class HeadLayerNorm(nn.LayerNorm):
    """LayerNorm over every head, with one weight and bias for all heads of the layer."""

    def __init__(self, width: int, shard: Shard) -> None:
        super().__init__(width, eps=NORM_EPSILON, dtype=shard.dtype)
        self.group = shard.group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the shape stays."""
        weight, bias = (shared_by_heads(parameter, self.group) for parameter in (self.weight, self.bias))
        return layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """One residual block."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard) -> None:
        super().__init__()
        self.attention_norm = norm(config.norm, config.width, shard.dtype)
        self.attention = Attention(config, layer, shard)
        self.feed_forward_norm = norm(config.norm, config.width, shard.dtype)
        self.feed_forward = FeedForward(config, shard)

    def forward(self, x: Tensor, rows: Rows, cache: LayerCache | None) -> Tensor:
        """(N, B, D) -> (N', B, D); the pattern says which rows leave."""
        x = self.attention.pattern.residual(x, rows) + self.attention(self.attention_norm(x), rows, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Attention(nn.Module):
    """Projections around an attention pattern (paper section 3.1; docs/training.md lists the switches)."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard) -> None:
        super().__init__()
        self.pattern = ARCHITECTURES[config.architecture](config, layer, shard)
        self.head_width = config.head_width
        self.segment_length = config.segment_length
        self.rotated = config.rotary == "every_layer" or layer == 0
        self.dropout = config.dropout
        self.query = ColumnLinear(config.width, config.width, False, shard)
        self.key = ColumnLinear(config.width, config.key_value_width, False, shard)
        self.value = None if config.tied_key_value else ColumnLinear(config.width, config.key_value_width, False, shard)
        self.query_norm = HeadRmsNorm(self.head_width, shard) if config.qk_norm else nn.Identity()
        self.key_norm = HeadRmsNorm(self.head_width, shard) if config.qk_norm else nn.Identity()
        self.key_value_norm = HeadLayerNorm(self.head_width, shard) if config.key_value_norm else nn.Identity()
        self.output = RowLinear(config.width, config.width, config.bias, shard)
        self.first_output = None
        if config.has_first_projection:
            self.first_output = RowLinear(config.width, config.width, config.bias, shard)

    def forward(self, x: Tensor, rows: Rows, cache: LayerCache | None) -> Tensor:
        """(N, B, D) -> (N', B, D)."""
        asking = self.pattern.asking(x.shape[0])
        q = self.query_norm(self._heads(self.query(x[-asking:])))
        k = self.key_norm(self._heads(self.key(x)))
        if self.rotated:
            q, k = rotate(q, rows.last(asking).rotation), rotate(k, rows.rotation)
        k = self.key_value_norm(k)
        v = k if self.value is None else self._heads(self.value(x))
        attended = self._attend(q, KeyValue(k, v, rows.documents), cache)
        return self._project(attended.permute(2, 0, 1, 3).flatten(2), rows.start)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).permute(1, 2, 0, 3)  # (N, B, H*E) -> (B, H, N, E)

    def _attend(self, q: Tensor, key_value: KeyValue, cache: LayerCache | None) -> Tensor:
        if cache is not None:
            return self.pattern.stream(q, key_value, cache)
        rate = self.dropout if self.training else 0.0
        with tensor_parallel_random() if rate else nullcontext():
            return self.pattern.attend(q, key_value, rate)

    def _project(self, x: Tensor, start: int) -> Tensor:
        if self.first_output is None:
            return self.output(x)
        border = min(max(self.segment_length - start, 0), x.shape[0])
        first, rest = x[:border], x[border:]
        parts = [layer(rows) for layer, rows in ((self.first_output, first), (self.output, rest)) if rows.shape[0]]
        return torch.cat(parts)


class FeedForward(nn.Module):
    """Linear-GELU-Linear, or SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = ColumnLinear(config.width, config.feed_forward_width, config.bias, shard)
        self.gate = None
        if config.activation == "swiglu":
            self.gate = ColumnLinear(config.width, config.feed_forward_width, config.bias, shard)
        self.down = RowLinear(config.feed_forward_width, config.width, config.bias, shard)

    def forward(self, x: Tensor) -> Tensor:
        """(N, B, D) -> (N, B, D)."""
        hidden = gelu(self.up(x)) if self.gate is None else silu(self.gate(x)) * self.up(x)
        if self.dropout and self.training:
            with tensor_parallel_random():
                hidden = dropout(hidden, self.dropout)
        return self.down(hidden)
