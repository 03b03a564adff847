"""The residual block (paper section 3): attention and a feed-forward network, each after a normalisation.

Activations are (N, B, D): positions first, as Megatron-core's linears want them. Heads and hidden widths are this
rank's share of the tensor group.
"""

from contextlib import nullcontext

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, rms_norm, silu

from ecp_scale.attention import Rotation, SegmentCache, rotate, segment_attention
from ecp_scale.config import ModelConfig
from ecp_scale.models.linear import ColumnLinear, RowLinear, Shard
from ecp_scale.parallel.random import tensor_parallel_random

NORM_EPSILON = 1e-5


def norm(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    """LayerNorm or RMSNorm over the last dimension, the same on every rank of a tensor group."""
    layer = nn.LayerNorm if kind == "layernorm" else nn.RMSNorm
    return layer(width, eps=NORM_EPSILON, dtype=dtype)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over every head, with one weight for all heads of the layer.

    Trap: a rank sees the gradient of its own heads only. The copy's backward sums them over the group; without that
    the replicas of the weight drift apart in silence.
    """

    def __init__(self, width: int, shard: Shard) -> None:
        super().__init__(width, eps=NORM_EPSILON, dtype=shard.dtype)
        self.group = shard.group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the shape stays."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.group)
        return rms_norm(x, self.normalized_shape, weight, self.eps)


class Block(nn.Module):
    """One residual block."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard) -> None:
        super().__init__()
        self.attention_norm = norm(config.norm, config.width, shard.dtype)
        self.attention = Attention(config, layer, shard)
        self.feed_forward_norm = norm(config.norm, config.width, shard.dtype)
        self.feed_forward = FeedForward(config, shard)

    def forward(self, x: Tensor, rotation: Rotation, start: int, cache: SegmentCache | None) -> Tensor:
        """(N, B, D) -> (N, B, D); ``start`` is the absolute position of the first row."""
        x = x + self.attention(self.attention_norm(x), rotation, start, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Attention(nn.Module):
    """Segment attention with its projections (paper section 3.1; ecp.md's `paper` and `scaled` switches)."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.segment_length = config.segment_length
        self.rotated = config.rotary == "every_layer" or layer == 0
        self.dropout = config.dropout
        self.query = ColumnLinear(config.width, config.width, False, shard)
        self.key = ColumnLinear(config.width, config.key_value_width, False, shard)
        self.value = None if config.tied_key_value else ColumnLinear(config.width, config.key_value_width, False, shard)
        self.query_norm = HeadNorm(self.head_width, shard) if config.qk_norm else nn.Identity()
        self.key_norm = HeadNorm(self.head_width, shard) if config.qk_norm else nn.Identity()
        self.output = RowLinear(config.width, config.width, config.bias, shard)
        self.first_output = None
        if config.first_segment_projection:
            self.first_output = RowLinear(config.width, config.width, config.bias, shard)

    def forward(self, x: Tensor, rotation: Rotation, start: int, cache: SegmentCache | None) -> Tensor:
        """(N, B, D) -> (N, B, D)."""
        q = self.query_norm(self._heads(self.query(x)))
        k = self.key_norm(self._heads(self.key(x)))
        if self.rotated:
            q, k = rotate(q, rotation), rotate(k, rotation)
        v = k if self.value is None else self._heads(self.value(x))
        attended = self._attend(q, k, v, cache)
        return self._project(attended.permute(2, 0, 1, 3).flatten(2), start)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).permute(1, 2, 0, 3)  # (N, B, H*E) -> (B, H, N, E)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: SegmentCache | None) -> Tensor:
        if cache is not None:
            return cache.attend(q, k, v)
        rate = self.dropout if self.training else 0.0
        with tensor_parallel_random() if rate else nullcontext():
            return segment_attention(q, k, v, self.segment_length, dropout=rate)[0]

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
