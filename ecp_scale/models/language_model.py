"""The autoregressive language model: embedding, blocks, norm, output layer."""

from typing import cast

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor, nn

from ecp_scale.attention import rotation
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.models.blocks import Block, norm
from ecp_scale.models.linear import ColumnLinear, Embedding, Shard
from ecp_scale.models.patterns import Pattern
from ecp_scale.models.rows import Documents, Rows, Stream


class LanguageModel(nn.Module):
    """A language model of any architecture on one rank of a tensor group.

    R is the number of trained positions, the last of a sequence: all of them, or the latents of a latent model.
    The stored vocabulary is padded so that every rank holds as many rows; the padding has probability 0 and never
    shows outside.
    """

    def __init__(self, config: ModelConfig, shard: Shard, attention: AttentionConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.masking = attention or AttentionConfig()
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
        """Negative log-likelihood of the targets of every trained position.

        Args:
            tokens: token ids (B, N).
            targets: the token that follows each of them (B, N).

        Returns:
            Losses in nats (B, R), float32.
        """
        scores = self._local_logits(tokens, None)
        return vocab_parallel_cross_entropy(scores, targets.t()[-scores.shape[0] :].contiguous()).t()

    def logits(self, tokens: Tensor, stream: Stream | None = None) -> Tensor:
        """Scores of the next token, over the true vocabulary, complete on every rank.

        Args:
            tokens: token ids (B, N).
            stream: from ``new_stream``; the tokens then continue what it has seen.

        Returns:
            Logits (B, R, V) of the trained positions.
        """
        local = self._local_logits(tokens, stream)
        gathered = gather_from_tensor_model_parallel_region(local, group=self.shard.group)
        return gathered[..., : self.config.known_vocab_size].transpose(0, 1)

    def new_stream(self) -> Stream:
        """An empty stream. Its memory is bounded where ``config.geometry.bounded_cache`` says so.

        Raises:
            NotImplementedError: where the architecture's context is not causal (``config.geometry.streams``).
        """
        return Stream([pattern.new_cache() for pattern in self._patterns()])

    def _local_logits(self, tokens: Tensor, stream: Stream | None) -> Tensor:
        """Scores (R, B, local rows); rows of the padding are -inf."""
        rows = self._rows(tokens, stream)
        x = self.embedding(tokens.t().contiguous())
        for number, (block, pattern) in enumerate(zip(self.layers, self._patterns(), strict=True)):
            x = block(x, rows, stream.caches[number] if stream else None)
            rows = pattern.outgoing(rows)
        scores = self.output(self.norm(x))
        scores[..., self.local_vocab_size :] = -torch.inf
        return scores

    def _patterns(self) -> list[Pattern]:
        return [cast(Block, block).attention.pattern for block in self.layers]

    def _rows(self, tokens: Tensor, stream: Stream | None) -> Rows:
        """Positions and documents of tokens (B, N); the stream moves on."""
        start = stream.position if stream else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        documents = None
        if self.masking.document_mask:
            end = self.masking.end_of_document
            assert end is not None, "end_of_document is read from the tokenizer before the model is built"
            found = Documents.of(tokens, end, stream.documents if stream else None)
            documents = found.ids
            positions = found.positions if self.masking.restart_positions else positions
            if stream:
                stream.documents = found.next_token(tokens, end)
        if stream:
            stream.position += tokens.shape[1]
        at_least_float32 = torch.promote_types(self.shard.dtype, torch.float32)
        turns = rotation(positions, self.config.head_width, self.config.rotary_theta, at_least_float32)
        return Rows(turns, documents, start)
