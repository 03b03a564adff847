"""What the benchmarks compare with: a straightforward implementation of our own, and libraries of others."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from ecp_scale.config import ModelConfig


class MaterialisedLanguageModel(nn.Module):
    """The paper's model on one device as one would first write it: scores as matrices, those of the vocabulary for all
    positions, everything kept for the backward pass.

    ``paper`` settings, with ``dropout`` of attention weights and of the hidden layer. ``by_segment`` makes the scores
    of one segment at a time with what it sees; without that they are one n x n matrix with a mask.
    """

    def __init__(self, config: ModelConfig, by_segment: bool, dropout: float = 0.0, layers: int | None = None) -> None:
        super().__init__()
        self.segment_length = config.segment_length
        self.embedding = nn.Embedding(config.known_vocab_size, config.width)
        self.blocks = nn.ModuleList(
            _MaterialisedBlock(config, layer, by_segment, dropout) for layer in range(layers or config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.known_vocab_size)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of tokens (B, N)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.output(self.norm(x)).flatten(0, 1), targets.flatten())


class _MaterialisedBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, by_segment: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        width = config.width
        self.attend = self._by_segment if by_segment else self._masked
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
        attended = self.attend(q, u).transpose(1, 2).flatten(2)
        first, others = attended[:, : self.segment_length], attended[:, self.segment_length :]
        x = x + torch.cat((self.first_output(first), self.output(others)), dim=1)
        return x + self.down(self.dropout(gelu(self.up(self.feed_forward_norm(x)))))

    def _by_segment(self, q: Tensor, u: Tensor) -> Tensor:
        m, parts = self.segment_length, []
        for start in range(0, q.shape[2], m):
            queries, seen = q[:, :, start : start + m], u[:, :, max(0, start - m) : start + m]
            hidden = torch.ones(queries.shape[2], seen.shape[2], dtype=torch.bool, device=q.device)
            parts.append(self._attend(queries, seen, hidden.triu(seen.shape[2] - queries.shape[2] + 1)))
        return torch.cat(parts, dim=2)

    def _masked(self, q: Tensor, u: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2], device=q.device)
        segments = positions // self.segment_length
        hidden = positions > positions[:, None]
        return self._attend(q, u, hidden | (segments[:, None] - segments > 1))

    def _attend(self, q: Tensor, u: Tensor, hidden: Tensor) -> Tensor:
        scores = q @ u.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return self.dropout(scores.masked_fill(hidden, -torch.inf).softmax(-1)) @ u


def _rotated(x: Tensor) -> Tensor:
    width = x.shape[-1]
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.outer(torch.arange(x.shape[-2], device=x.device), rates)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack(turned, dim=-1).flatten(-2)


class HuggingFace(nn.Module):
    """Llama or GPT-2 with scaled-dot-product attention, as deep and as wide, and with about as many parameters."""

    def __init__(self, kind: str, config: ModelConfig) -> None:
        super().__init__()
        self.model = hugging_face(kind, config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of tokens (B, N), which it shifts itself."""
        return self.model(input_ids=tokens, labels=tokens).loss


class PerceiverArPytorch(nn.Module):
    """PyPI's perceiver-ar-pytorch: as deep, as wide and with as many latents."""

    def __init__(self, config: ModelConfig) -> None:
        from perceiver_ar_pytorch import PerceiverAR

        super().__init__()
        assert config.latents is not None
        self.model = PerceiverAR(
            num_tokens=config.known_vocab_size,
            dim=config.width,
            depth=config.layers - 1,  # after the one that reads the whole sequence
            max_seq_len=config.sequence_length,
            cross_attn_seq_len=config.sequence_length - config.latents,
            dim_head=config.head_width,
            heads=config.heads,
            ff_mult=config.feed_forward_width // config.width,
        )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the latents of tokens (B, N)."""
        return self.model(tokens, labels=targets)


def hugging_face(kind: str, config: ModelConfig) -> Any:
    """The Hugging Face model of random weights."""
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
            bos_token_id=0,
            eos_token_id=0,
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
