"""Attention patterns of one layer, and what a layer does to the residual stream.

Each is the maths of ``ecp_scale.attention`` with its sizes; a pattern has no parameters but the compression.
Shapes as there; x is (N, B, D).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import adaptive_avg_pool1d

from ecp_scale.attention import KeyValue, SegmentCache, attend, documents_on, latent_attention, segment_attention
from ecp_scale.config import AttentionBackend
from ecp_scale.errors import InputError
from ecp_scale.models.positions import LayerCache, Positions
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.halo import Halo
from ecp_scale.parallel.linear import with_summed_gradient
from ecp_scale.precision import linear


class Pattern(nn.Module):
    """One layer's attention pattern. The residual stream passes unchanged unless a pattern says otherwise."""

    backend: AttentionBackend = "auto"
    """How segments are computed."""

    def query_rows(self, positions: int) -> int:
        """Number of queries of a layer that reads so many positions: they are of its last ones."""
        return positions

    def attend(self, q: Tensor, key_value: KeyValue, dropout: float) -> Tensor:
        """Queries (B, H, Nq, E) to attended values (B, H, N', E), one for each position that leaves the layer."""
        raise NotImplementedError

    def residual(self, x: Tensor, positions: Positions) -> Tensor:
        """What the layer's output is added to: (N, B, D) -> (N', B, D)."""
        return x

    def output_positions(self, positions: Positions) -> Positions:
        """The positions that leave the layer."""
        return positions

    def new_cache(self) -> LayerCache:
        """Empty caches of the layer, for streaming."""
        raise NotImplementedError(f"{type(self).__name__} does not stream")

    def stream(self, q: Tensor, key_value: KeyValue, cache: LayerCache) -> Tensor:
        """``attend`` for positions that follow those in the cache."""
        (only,) = cache
        return only.attend(q, key_value)


class CausalSegments(Pattern):
    """Every segment sees itself causally, and what a window leaves of its left neighbour.

    Where ranks share a sequence, the neighbour of their first segment comes from the rank to the left.
    """

    def __init__(self, segment_length: int, window: int | None = None, context: ProcessGroup | None = None) -> None:
        super().__init__()
        self.segment_length, self.window = segment_length, window
        self.halo = None if context is None else Halo(context)

    def attend(self, q: Tensor, key_value: KeyValue, dropout: float) -> Tensor:
        """Segment attention; where ranks share the sequence, with the segment from the rank to the left."""
        k, v, documents = key_value
        left = None if self.halo is None else self._exchange
        out, _ = segment_attention(
            q,
            k,
            v,
            self.segment_length,
            left,
            window=self.window,
            documents=documents,
            dropout=dropout,
            backend=self.backend,
        )
        return out

    def _exchange(self, right: KeyValue) -> Callable[[], KeyValue]:
        """One message: keys and values are one tensor where they are tied, and one behind the other where not."""
        assert self.halo is not None
        tied = right.keys is right.values
        promise = self.halo(right.keys if tied else torch.cat((right.keys, right.values)))

        def left() -> KeyValue:
            message = promise()
            return KeyValue(message, message) if tied else KeyValue(*message.chunk(2))

        return left

    def new_cache(self) -> LayerCache:
        """An empty cache, which never holds more than two segments."""
        return [SegmentCache(self.segment_length, window=self.window, backend=self.backend)]


class ShiftedGroups(Pattern):
    """Causal groups that see nothing but themselves; for the second half of the heads they lie half a group later.

    Trap: rolling the sequence by half a group, as this pattern is often written, puts the sequence's end and its start
    into one group, where a plain causal mask lets the start see the end. Here the shifted heads begin and end with half
    a group instead.
    """

    def __init__(self, group_length: int, key_value_heads: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.group_length = group_length
        local = key_value_heads // parallel.tp_size
        plain = min(max(key_value_heads // 2 - parallel.tp_rank * local, 0), local)
        kinds = ((plain, group_length), (local - plain, group_length // 2))
        self.kinds = [(heads, first_length) for heads, first_length in kinds if heads]
        """Key/value heads (local) of each kind, and the length of their first group."""

    def attend(self, q: Tensor, key_value: KeyValue, dropout: float) -> Tensor:
        """Each kind of heads with its own groups."""
        outputs = [
            segment_attention(
                queries,
                part.keys,
                part.values,
                self.group_length,
                look_back=False,
                first_length=first_length,
                documents=part.documents,
                dropout=dropout,
                backend=self.backend,
            )[0]
            for queries, part, (_, first_length) in zip(*self._split(q, key_value), self.kinds, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def new_cache(self) -> LayerCache:
        """Empty caches, one for the heads with plain groups and one for those with shifted ones."""
        kinds = (first for _, first in self.kinds)
        return [
            SegmentCache(self.group_length, look_back=False, first_length=first, backend=self.backend)
            for first in kinds
        ]

    def stream(self, q: Tensor, key_value: KeyValue, cache: LayerCache) -> Tensor:
        """Each kind of heads through its own cache."""
        parts = zip(cache, *self._split(q, key_value), strict=True)
        return torch.cat([kind.attend(queries, part) for kind, queries, part in parts], dim=1)

    def _split(self, q: Tensor, key_value: KeyValue) -> tuple[list[Tensor], list[KeyValue]]:
        k, v, documents = key_value
        counts = [heads for heads, _ in self.kinds]
        keys = k.split(counts, dim=1)
        values = keys if v is k else v.split(counts, dim=1)
        queries = q.split([count * (q.shape[1] // k.shape[1]) for count in counts], dim=1)
        return list(queries), [KeyValue(*pair, documents) for pair in zip(keys, values, strict=True)]


class LatentQueries(Pattern):
    """The latents see everything, causally among themselves; nothing but the latents is left of the stream."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = latents

    def query_rows(self, positions: int) -> int:
        """Number of latents among so many positions."""
        return min(self.latents, positions)

    def attend(self, q: Tensor, key_value: KeyValue, dropout: float) -> Tensor:
        """A causal mask aligned to the end."""
        return attend(q, key_value, dropout=dropout, backend=self.backend)

    def residual(self, x: Tensor, positions: Positions) -> Tensor:
        """The rows of the latents, to which the layer's output is added."""
        return x[-self.latents :]

    def output_positions(self, positions: Positions) -> Positions:
        """Positions of the latents."""
        return positions.last(self.query_rows(positions.rotation.cos.shape[-2]))


class LatentsAndContext(Pattern):
    """The context sees itself, or its own segment of it, in both directions; the latents see everything."""

    def __init__(self, latents: int, context_segment_length: int | None = None, drop_context: bool = True) -> None:
        super().__init__()
        self.latents, self.context_segment_length, self.drop_context = latents, context_segment_length, drop_context

    def attend(self, q: Tensor, key_value: KeyValue, dropout: float) -> Tensor:
        """Context and latents."""
        return latent_attention(
            q,
            key_value,
            min(self.latents, q.shape[-2]),
            self.context_segment_length,
            dropout=dropout,
            context_dropout=dropout if self.drop_context else 0.0,
            backend=self.backend,
        )


class Compression(nn.Linear):
    """One Linear(n - l -> c) along the sequence, shared by all channels: (B, H, n - l, E) -> (B, H, c, E)."""

    def __init__(self, context: int, compressed: int, parallel: ParallelContext) -> None:
        super().__init__(context, compressed, dtype=parallel.dtype)
        self.group = parallel.tp_group

    def forward(self, x: Tensor) -> Tensor:
        """Compress the positions."""
        weight, bias = (with_summed_gradient(parameter, self.group) for parameter in (self.weight, self.bias))
        return linear(x.transpose(-1, -2), weight, bias).transpose(-1, -2)


class CompressingContext(LatentsAndContext):
    """Latents and context, whose attended values are then compressed to c rows.

    With a document mask the compressed rows belong to the document that spans the border of context and latents, the
    only one that has positions on both sides; positions of other documents count as zeros.
    """

    def __init__(self, latents: int, context: int, compressed: int, residual: str, parallel: ParallelContext) -> None:
        super().__init__(latents, drop_context=False)
        self.context, self.compressed, self.aligned = context, compressed, residual == "aligned"
        self.compression = Compression(context, compressed, parallel)

    def attend(self, q: Tensor, key_value: KeyValue, dropout: float) -> Tensor:
        """Attend, then compress the context's part."""
        context, latents = self._parts(super().attend(q, key_value, dropout), dim=-2)
        if key_value.documents is not None:
            context = context * self._of_border_document(documents_on(key_value.documents, q.device))[:, None, :, None]
        return torch.cat((self.compression(context), latents), dim=-2)

    def residual(self, x: Tensor, positions: Positions) -> Tensor:
        """Context rows averaged over the share that each compressed row stands for, and the latents' own rows."""
        context, latents = self._parts(x, dim=0)
        if not self.aligned:
            return x[: self.compressed + self.latents]
        if positions.documents is None:
            return torch.cat((self._pool(context), latents))
        documents = documents_on(positions.documents, x.device)
        counts = self._of_border_document(documents).t()[..., None].to(x.dtype)
        pooled, share = self._pool(context * counts), self._pool(counts)
        return torch.cat((pooled / share.clamp(min=1 / self.context), latents))

    def output_positions(self, positions: Positions) -> Positions:
        """A compressed row stands at the last position of its share."""
        device = positions.rotation.cos.device
        shares = torch.arange(1, self.compressed + 1, device=device)
        last = (shares * self.context + self.compressed - 1) // self.compressed - 1
        kept = torch.cat((last, torch.arange(self.context, self.context + self.latents, device=device)))
        documents = positions.documents
        if documents is not None:
            border = documents[:, self.context - 1 : self.context]
            documents = torch.cat((border.expand(-1, self.compressed), documents[:, self.context :]), dim=1)
        return Positions(positions.rotation.at(kept), documents, positions.start)

    def _parts(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Context and latents."""
        expected = self.context + self.latents
        if x.shape[dim] != expected:
            raise InputError(f"the compression of this model reads {expected} positions, found {x.shape[dim]}")
        return x.split([self.context, self.latents], dim=dim)

    def _pool(self, x: Tensor) -> Tensor:
        """Mean of the rows of each share: (n - l, B, D) -> (c, B, D)."""
        return adaptive_avg_pool1d(x.permute(1, 2, 0), self.compressed).permute(2, 0, 1)

    def _of_border_document(self, documents: Tensor) -> Tensor:
        """Which context positions (B, n - l) belong to the document of the last one."""
        return documents[:, : self.context] == documents[:, self.context - 1 : self.context]
