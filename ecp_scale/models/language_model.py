"""The autoregressive language model: embedding, blocks, norm, output layer."""

from typing import cast

import torch
from torch import Tensor, nn

from ecp_scale.attention import rotation
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.models.blocks import Block
from ecp_scale.models.linear import Embedding, Shard, enter
from ecp_scale.models.norms import norm
from ecp_scale.models.output import VocabularyOutput
from ecp_scale.models.patterns import Pattern
from ecp_scale.models.rows import Documents, Rows, Stream
from ecp_scale.parallel.megatron import gather_from_tensor_model_parallel_region
from ecp_scale.parallel.recompute import recomputed


class LanguageModel(nn.Module):
    """A language model of any architecture on one rank of a tensor group.

    R is the number of trained positions, the last of a sequence: all of them, or the latents of a latent model.
    The stored vocabulary is padded so that every rank holds as many rows; the padding has probability 0 and never
    shows outside.
    """

    def __init__(self, config: ModelConfig, shard: Shard, attention: AttentionConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.attention = attention or AttentionConfig()
        self.shard = shard
        padded = config.padded_vocab_size(shard.size)
        self.embedding = Embedding(padded, config.width, shard)
        self.layers = nn.ModuleList(Block(config, layer, shard) for layer in range(config.layers))
        for pattern in self._patterns():
            pattern.backend = self.attention.backend
        self.norm = norm(config.norm, config.width, shard)
        self.output = VocabularyOutput(config.width, padded, config.known_vocab_size, config.bias, shard)
        self.embedding.weight.vocabulary_rows = config.known_vocab_size

    def forward(self, tokens: Tensor, targets: Tensor, trained: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of the targets of every trained position of this rank's run of the sequence.

        Args:
            tokens: token ids (B, N) of the whole sequence, also where ranks share it.
            targets: the token that follows each of them (B, N).
            trained: which of ``trained_targets`` (B, R) count; None means all.

        Returns:
            The sum of the losses that count, in nats, to train on; and all losses (B, R), without gradients. At least
            float32.
        """
        wanted = self.trained_targets(targets).t()
        counted = None if trained is None else trained.t()
        total, losses = self.output(self._outgoing(tokens, None), wanted, counted)
        return total, losses.t()

    def trained_targets(self, targets: Tensor) -> Tensor:
        """Those targets (B, R) of a sequence (B, N) whose loss this rank computes."""
        return targets[:, self._run(targets.shape[1])][:, -self.config.geometry.trained_positions :]

    def _run(self, positions: int) -> slice:
        """Positions of a sequence that this rank holds."""
        context = self.shard.context
        if context is None:
            return slice(0, positions)
        length = positions // context.size()
        return slice(context.rank() * length, (context.rank() + 1) * length)

    def logits(self, tokens: Tensor, stream: Stream | None = None, last: int | None = None) -> Tensor:
        """Scores of the next token, over the true vocabulary, complete on every rank.

        Args:
            tokens: token ids (B, N); where ranks share the sequence, each returns the scores of its run.
            stream: from ``new_stream``; the tokens then continue what it has seen.
            last: how many of the last trained positions are asked for; None means all.

        Returns:
            Logits (B, R, V) of the trained positions.
        """
        outgoing = self._outgoing(tokens, stream)
        local = self.output(outgoing if last is None else outgoing[-last:])
        gathered = gather_from_tensor_model_parallel_region(local, group=self.shard.group)
        return gathered[..., : self.config.known_vocab_size].transpose(0, 1)

    def new_stream(self) -> Stream:
        """An empty stream. Its memory is bounded where ``config.geometry.bounded_cache`` says so.

        Raises:
            NotImplementedError: where the architecture's context is not causal (``config.geometry.streams``).
        """
        return Stream([pattern.new_cache() for pattern in self._patterns()])

    def _outgoing(self, tokens: Tensor, stream: Stream | None) -> Tensor:
        """What the output layer reads (R, B, D)."""
        rows = self._rows(tokens, stream)
        x = self.embedding(tokens[:, self._run(tokens.shape[1])])
        for number, (block, pattern) in enumerate(zip(self.layers, self._patterns(), strict=True)):
            cache = stream.caches[number] if stream else None
            if self.training and self.shard.recompute == "full":
                x = recomputed(block, x, rows, cache, random=self.config.dropout > 0)
            else:
                x = block(x, rows, cache)
            rows = pattern.outgoing(rows)
        return enter(self.norm(x), self.shard)

    def _patterns(self) -> list[Pattern]:
        return [cast(Block, block).attention.pattern for block in self.layers]

    def _rows(self, tokens: Tensor, stream: Stream | None) -> Rows:
        """Positions and documents of tokens (B, N); the stream moves on."""
        start = stream.position if stream else 0
        run = self._run(tokens.shape[1])
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        documents = None
        if self.attention.document_mask:
            end = self.attention.end_of_document
            assert end is not None, "end_of_document is read from the tokenizer before the model is built"
            found = Documents.of(tokens, end, stream.documents if stream else None)
            # Those of the segment to the left are known here; they need not travel with its keys and values.
            documents = found.ids[:, max(0, run.start - self.config.geometry.halo_positions) : run.stop]
            positions = found.positions if self.attention.restart_positions else positions
            if stream:
                stream.documents = found.next_token(tokens, end)
        if stream:
            stream.position += tokens.shape[1]
        at_least_float32 = torch.promote_types(self.shard.dtype, torch.float32)
        turns = rotation(positions[..., run], self.config.head_width, self.config.rotary_theta, at_least_float32)
        return Rows(turns, documents, start + run.start)
