"""What the benchmarks compare with: a straightforward implementation of our own, and libraries of others."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from ecp_scale.config import ModelConfig


class MaterialisedLanguageModel(nn.Module):
    """The paper's model on one device as one would first write it: scores of each pair of segments as a matrix, the
    scores of the vocabulary for all positions, everything kept for the backward pass.

    ``paper`` settings without dropout.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.segment_length = config.segment_length
        self.embedding = nn.Embedding(config.known_vocab_size, config.width)
        self.blocks = nn.ModuleList(_MaterialisedBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.known_vocab_size)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of tokens (B, N)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.output(self.norm(x)).flatten(0, 1), targets.flatten())


class _MaterialisedBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.width
        self.heads, self.segment_length, self.rotated = config.heads, config.segment_length, layer == 0
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.output, self.first_output = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = (
            nn.Linear(width, config.feed_forward_width),
            nn.Linear(config.feed_forward_width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, u = (
            linear(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key_value)
        )
        if self.rotated:
            q, u = _rotated(q), _rotated(u)
        m, parts = self.segment_length, []
        for start in range(0, x.shape[1], m):
            queries, seen = q[:, :, start : start + m], u[:, :, max(0, start - m) : start + m]
            scores = queries @ seen.transpose(-1, -2) / math.sqrt(q.shape[-1])
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(seen.shape[2] - queries.shape[2] + 1)
            attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ seen
            parts.append((self.output if start else self.first_output)(attended.transpose(1, 2).flatten(2)))
        x = x + torch.cat(parts, dim=1)
        return x + self.down(gelu(self.up(self.feed_forward_norm(x))))


def _rotated(x: Tensor) -> Tensor:
    width = x.shape[-1]
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.outer(torch.arange(x.shape[-2], device=x.device), rates)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def hugging_face(kind: str, config: ModelConfig) -> Any:
    """Llama or GPT-2 with scaled-dot-product attention, as deep and as wide, and with about as many parameters."""
    import transformers

    shared: dict[str, Any] = {"attn_implementation": "sdpa", "tie_word_embeddings": False}
    if kind == "gpt2":
        gpt2 = transformers.GPT2Config(
            vocab_size=config.known_vocab_size,
            n_positions=config.sequence_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.feed_forward_width,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
        return transformers.GPT2LMHeadModel(gpt2)
    llama = transformers.LlamaConfig(
        vocab_size=config.known_vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feed_forward_width * 2 // 3,  # three matrices, of as many elements as two
        max_position_embeddings=config.sequence_length,
        **shared,
    )
    return transformers.LlamaForCausalLM(llama)
