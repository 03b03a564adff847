"""The autoregressive language model: embedding, blocks, norm, output layer."""

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor, nn

from ecp_scale.attention import SegmentCache, rotation
from ecp_scale.config import ModelConfig
from ecp_scale.models.blocks import Block, norm
from ecp_scale.models.linear import ColumnLinear, Embedding, Shard


class LanguageModel(nn.Module):
    """ECP language model on one rank of a tensor group.

    The stored vocabulary is padded so that every rank holds as many rows; the padding has probability 0 and never
    shows outside.
    """

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        super().__init__()
        self.config = config
        self.shard = shard
        padded = config.padded_vocab_size(shard.size)
        local = padded // shard.size
        self.local_vocab_size = min(max(config.known_vocab_size - shard.rank * local, 0), local)
        self.embedding = Embedding(padded, config.width, shard)
        self.layers = nn.ModuleList(Block(config, layer, shard) for layer in range(config.layers))
        self.norm = norm(config.norm, config.width, shard.dtype)
        self.output = ColumnLinear(config.width, padded, config.bias, shard)
        for parameter in (self.embedding.weight, *self.output.parameters()):
            parameter.vocabulary_rows = config.known_vocab_size

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of every target.

        Args:
            tokens: token ids (B, N).
            targets: the token that follows each of them (B, N).

        Returns:
            Losses in nats (B, N), float32.
        """
        return vocab_parallel_cross_entropy(self._local_logits(tokens, 0, None), targets.t().contiguous()).t()

    def logits(self, tokens: Tensor, start: int = 0, caches: list[SegmentCache] | None = None) -> Tensor:
        """Scores of the next token, over the true vocabulary, complete on every rank.

        Args:
            tokens: token ids (B, N).
            start: absolute position of the first token.
            caches: one per layer, from ``new_caches``; the tokens then continue what the caches have seen.

        Returns:
            Logits (B, N, V).
        """
        local = self._local_logits(tokens, start, caches)
        gathered = gather_from_tensor_model_parallel_region(local, group=self.shard.group)
        return gathered[..., : self.config.known_vocab_size].transpose(0, 1)

    def new_caches(self) -> list[SegmentCache]:
        """Empty caches for streaming: at most two segments of keys and values per layer."""
        return [SegmentCache(self.config.segment_length) for _ in self.layers]

    def _local_logits(self, tokens: Tensor, start: int, caches: list[SegmentCache] | None) -> Tensor:
        """Scores (N, B, local rows); rows of the padding are -inf."""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        at_least_float32 = torch.promote_types(self.shard.dtype, torch.float32)
        turns = rotation(positions, self.config.head_width, self.config.rotary_theta, at_least_float32)
        x = self.embedding(tokens.t().contiguous())
        for layer, block in enumerate(self.layers):
            x = block(x, turns, start, caches[layer] if caches else None)
        scores = self.output(self.norm(x))
        scores[..., self.local_vocab_size :] = -torch.inf
        return scores
