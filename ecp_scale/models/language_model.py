"""The autoregressive language model: embedding, blocks, norm, output layer."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ecp_scale.attention import rotation
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.models.blocks import Block
from ecp_scale.models.inputs import PositionEmbedding, ValueEmbedding
from ecp_scale.models.loss import OutputLayer
from ecp_scale.models.norms import norm
from ecp_scale.models.patterns import Pattern
from ecp_scale.models.positions import DocumentIds, Positions, Stream
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import (
    Embedding,
    gather_from_tensor_parallel_region,
    gather_to_tensor_parallel_region,
)
from ecp_scale.parallel.recompute import recomputed


class LanguageModel(nn.Module):
    """A language model of any architecture on one rank of a tensor group.

    R is the number of predictions: of all positions, or of the latents of a latent model, the last of a sequence; or
    one, of a classifier, whose label is the last target.
    The stored vocabulary is padded so that every rank holds as many rows; the padding has probability 0 and never
    shows outside.
    """

    def __init__(
        self, config: ModelConfig, parallel: ParallelContext, attention: AttentionConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention or AttentionConfig()
        self.parallel = parallel
        padded = config.padded_vocab_size(parallel.tp_size)
        if config.inputs == "tokens":
            self.embedding: Embedding | ValueEmbedding = Embedding(padded, config.width, parallel)
            self.embedding.weight.vocabulary_rows = config.known_vocab_size
        else:
            self.embedding = ValueEmbedding(config.width, parallel)
        self.position_embedding = None
        if config.learnt_positions:
            self.position_embedding = PositionEmbedding(config.sequence_length, config.width, parallel)
        self.layers = nn.ModuleList(Block(config, layer, parallel) for layer in range(config.layers))
        for pattern in self._patterns():
            pattern.backend = self.attention.backend
        self.norm = norm(config.norm, config.width, parallel)
        self.output = OutputLayer(config.width, padded, config.known_vocab_size, config.bias, parallel)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        counted: Tensor | None = None,
        stream: Stream | None = None,
        last: int | None = None,
        on_host: Tensor | None = None,
    ) -> Any:
        """Losses of the targets or, without targets, scores of the next token.

        Args:
            tokens: token ids (B, N) of the whole sequence, also where ranks share it.
            targets: the token that follows each of them (B, N).
            counted: which of ``trained_targets`` (B, R) count; None means all.
            stream: what came before, from ``new_stream``; it moves on.
            last: without targets, how many of the last trained positions are asked for; None means all.
            on_host: the same ids on the host, if they are there: its documents are then found without a wait.

        Returns:
            With targets, of this rank's run of the sequence: the sum of the negative log-likelihoods that count, in
            nats, to train on; and all of them (B, R), without gradients; at least float32. Without targets, logits
            (B, R, V) over the true vocabulary, complete on every rank of the tensor-parallel group.
        """
        positions = self._positions(tokens, stream, on_host)
        x_NBD = self.embedding(tokens[:, self._run(tokens.shape[1])])
        if self.position_embedding is not None:
            x_NBD = self.position_embedding(x_NBD)
        for number, (block, pattern) in enumerate(zip(self.layers, self._patterns(), strict=True)):
            cache = stream.caches[number] if stream else None
            if self.training and self.parallel.recompute == "full":
                x_NBD = recomputed(block, x_NBD, positions, cache, random=self.config.dropout > 0)
            else:
                x_NBD = block(x_NBD, positions, cache)
            positions = pattern.output_positions(positions)
        x_RBD = self._pooled(gather_to_tensor_parallel_region(self.norm(x_NBD), self.parallel))
        if targets is not None:
            wanted_RB = self.trained_targets(targets).t()
            total, losses_RB = self.output(x_RBD, wanted_RB, None if counted is None else counted.t())
            return total, losses_RB.t()
        local_RBV = self.output(x_RBD if last is None else x_RBD[-last:])
        logits_RBV = gather_from_tensor_parallel_region(local_RBV, self.parallel)
        return logits_RBV[..., : self.config.known_vocab_size].transpose(0, 1)

    def logits(self, tokens: Tensor, stream: Stream | None = None, last: int | None = None) -> Tensor:
        """Scores of the next token: ids (B, N) -> logits (B, R, V) of the trained positions; see ``forward``."""
        return self(tokens, stream=stream, last=last)

    def trained_targets(self, targets: Tensor) -> Tensor:
        """The targets (B, R) of a sequence (B, N) whose loss this rank computes."""
        if self.config.task == "classification":
            return targets[:, -1:]
        geometry, local = self.config.geometry, targets[:, self._run(targets.shape[1])]
        # A piece of a stream may be longer than a window.
        return local if geometry.streams else local[:, -geometry.trained_positions :]

    def _pooled(self, x: Tensor) -> Tensor:
        """What the output layer reads (R, B, D) of what leaves the last block."""
        if self.config.task == "language":
            return x
        return x.mean(0, keepdim=True) if self.config.pooling == "mean" else x[-1:]

    def _run(self, positions: int) -> slice:
        """Positions of a sequence that this rank holds."""
        context = self.parallel.cp_group
        if context is None:
            return slice(0, positions)
        length = positions // context.size()
        return slice(context.rank() * length, (context.rank() + 1) * length)

    def new_stream(self) -> Stream:
        """An empty stream. Its memory is bounded where ``config.geometry.bounded_cache`` says so.

        Raises:
            NotImplementedError: where the architecture's context is not causal (``config.geometry.streams``).
        """
        return Stream([pattern.new_cache() for pattern in self._patterns()])

    def _patterns(self) -> list[Pattern]:
        return [cast(Block, block).attention.pattern for block in self.layers]

    def _positions(self, tokens: Tensor, stream: Stream | None, on_host: Tensor | None = None) -> Positions:
        """Positions of tokens (B, N), and their documents, on the host if the ids are there; the stream moves on."""
        start = stream.position if stream else 0
        run = self._run(tokens.shape[1])
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        documents = None
        if self.attention.document_mask:
            end = self.attention.end_of_document
            assert end is not None, "end_of_document is read from the tokenizer before the model is built"
            before = stream.documents if stream else None
            found = DocumentIds.of(tokens if on_host is None else on_host, end, before)
            # Those of the segment to the left are known here; they need not travel with its keys and values.
            documents = found.ids[:, max(0, run.start - self.config.geometry.halo_positions) : run.stop]
            if self.attention.restart_positions:
                positions = DocumentIds.of(tokens, end, before).positions
            if stream:
                stream.documents = found.next_token(tokens, end)
        if stream:
            stream.position += tokens.shape[1]
        at_least_float32 = torch.promote_types(self.parallel.dtype, torch.float32)
        turns = rotation(positions[..., run], self.config.head_width, self.config.rotary_theta, at_least_float32)
        return Positions(turns, documents, start + run.start)
