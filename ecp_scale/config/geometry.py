"""What each architecture does with the positions of a sequence: which rows each layer keeps, who sees whom, how far
back.

Pure numbers: counting on the config, planning and the tests of the built models use them. The patterns themselves are
in ``ecp_scale.models.architectures``. Symbols: L layers, n sequence length, m segment length, l latents, c compressed
context, w window, g group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar


def causal_pairs(queries: int, keys: int) -> int:
    """Visible pairs of the last ``queries`` of ``keys`` positions under a causal mask."""
    return queries * keys - queries * (queries - 1) // 2


@dataclass(frozen=True)
class Geometry:
    """Positions of one sequence in one architecture. The base class is full causal attention."""

    layers: int
    sequence_length: int
    segment_length: int
    latents: int
    compressed_context: int
    window: int
    group_length: int

    fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the config besides ``sequence_length`` that this architecture reads; it ignores the others'."""
    streams = True
    """Whether tokens can follow one another through caches; latent models re-read their context instead."""
    bounded_cache = False
    """Whether what a stream must remember stops growing."""

    @property
    def halo_positions(self) -> int:
        """Positions that a rank needs of the one to its left where ranks share a sequence; 0: they cannot share it."""
        return 0

    @property
    def context(self) -> int:
        """Positions before the latents."""
        return self.sequence_length - self.latents

    @property
    def trained_positions(self) -> int:
        """Last positions of a sequence that have a loss."""
        return self.sequence_length

    @property
    def receptive_field_tokens(self) -> int:
        """Farthest position, counted from 1 at itself, that any position can depend on (within any sequence)."""
        return self.sequence_length

    @property
    def receptive_field_formula(self) -> str:
        """How ``receptive_field_tokens`` comes about."""
        return f"sequence_length = {self.sequence_length}"

    def key_rows(self, layer: int) -> int:
        """Rows that enter a layer; keys and values are computed for all of them."""
        return self.output_rows(layer - 1) if layer else self.sequence_length

    def output_rows(self, layer: int) -> int:
        """Rows that leave a layer's attention, and pass its output projection and feed-forward network."""
        return self.sequence_length

    def query_rows(self, layer: int) -> int:
        """Rows whose queries are computed."""
        return self.output_rows(layer)

    def score_pairs(self, layer: int) -> float:
        """Visible query-key pairs of a layer, mean over its heads."""
        return causal_pairs(self.sequence_length, self.sequence_length)

    @property
    def compression_parameters(self) -> int:
        """Parameters of the matrix that compresses the context along the sequence."""
        return 0

    def problems(self) -> Iterator[str]:
        """What makes these numbers impossible, given that no part is larger than the sequence."""
        return iter(())


class Transformer(Geometry):
    """Full causal attention."""


class Ecp(Geometry):
    """Every segment sees itself causally and all of its left neighbour (paper section 3)."""

    fields = ("segment_length", "first_segment_projection")
    bounded_cache = True

    @property
    def halo_positions(self) -> int:
        """A segment."""
        return self.segment_length

    @property
    def receptive_field_tokens(self) -> int:
        """(L+1)*m: the segment's own tokens and one more segment per layer."""
        return (self.layers + 1) * self.segment_length

    @property
    def receptive_field_formula(self) -> str:
        """How ``receptive_field_tokens`` comes about, in numbers."""
        product = f"({self.layers} + 1) * {self.segment_length}"
        return f"(layers + 1) * segment_length = {product} = {self.receptive_field_tokens}"

    def score_pairs(self, layer: int) -> float:
        """1.5 m per token, less the missing left of segment 0."""
        m, segments = self.segment_length, self.sequence_length // self.segment_length
        return segments * causal_pairs(m, m) + (segments - 1) * m * m

    def problems(self) -> Iterator[str]:
        """Segments must be full."""
        n, m = self.sequence_length, self.segment_length
        if n % m:
            yield f"model.sequence_length {n} is not a multiple of model.segment_length {m}"


class SlidingWindow(Geometry):
    """Every position sees the last w, its own included."""

    fields = ("window",)
    bounded_cache = True

    @property
    def halo_positions(self) -> int:
        """A window."""
        return self.window

    @property
    def receptive_field_tokens(self) -> int:
        """L*(w-1)+1."""
        return self.layers * (self.window - 1) + 1

    @property
    def receptive_field_formula(self) -> str:
        """How ``receptive_field_tokens`` comes about, in numbers."""
        return f"layers * (window - 1) + 1 = {self.layers} * ({self.window} - 1) + 1 = {self.receptive_field_tokens}"

    def score_pairs(self, layer: int) -> float:
        """w per token, less at the beginning."""
        n, w = self.sequence_length, min(self.window, self.sequence_length)
        return causal_pairs(w, w) + (n - w) * w


class LongLora(Geometry):
    """Causal groups of g positions; half of the heads has its groups shifted by g/2 (arXiv 2309.12307)."""

    fields = ("group_length",)
    bounded_cache = True

    @property
    def receptive_field_tokens(self) -> int:
        """(L+1)*g/2: the own group, and half a group more with every further layer."""
        return (self.layers + 1) * self.group_length // 2

    @property
    def receptive_field_formula(self) -> str:
        """How ``receptive_field_tokens`` comes about, in numbers."""
        product = f"({self.layers} + 1) * {self.group_length} / 2"
        return f"(layers + 1) * group_length / 2 = {product} = {self.receptive_field_tokens}"

    def score_pairs(self, layer: int) -> float:
        """Mean of the plain and of the shifted heads."""
        n, g = self.sequence_length, self.group_length
        shifted = causal_pairs(min(g // 2, n), min(g // 2, n)) + _grouped_pairs(max(0, n - g // 2), g)
        return (_grouped_pairs(n, g) + shifted) / 2

    def problems(self) -> Iterator[str]:
        """Groups have two halves."""
        if self.group_length % 2:
            yield f"model.group_length {self.group_length} is odd; half of the heads is shifted by half a group"


class LatentModel(Geometry):
    """Loss on the last l positions only; the n - l before them are context."""

    fields: ClassVar[tuple[str, ...]] = ("latents",)
    streams = False

    @property
    def trained_positions(self) -> int:
        """The latents, l."""
        return self.latents


class PerceiverAr(LatentModel):
    """Layer 0 reads all positions into the latents; the others are causal among the latents."""

    def output_rows(self, layer: int) -> int:
        """The latents, from layer 0 on."""
        return self.latents

    def score_pairs(self, layer: int) -> float:
        """Latents over everything, then among themselves."""
        return causal_pairs(self.latents, self.sequence_length if layer == 0 else self.latents)


class DoubleAttention(LatentModel):
    """The context sees itself in both directions, latents see everything; the last layer computes latents only."""

    def output_rows(self, layer: int) -> int:
        """All positions but in the last layer."""
        return self.latents if layer == self.layers - 1 else self.sequence_length

    def score_pairs(self, layer: int) -> float:
        """Context squared, and latents over everything."""
        context = 0 if layer == self.layers - 1 else self.context_pairs
        return context + causal_pairs(self.latents, self.key_rows(layer))

    @property
    def context_pairs(self) -> int:
        """Pairs among context positions."""
        return self.context**2

    def problems(self) -> Iterator[str]:
        """There must be a context."""
        if self.latents == self.sequence_length:
            yield f"model.latents {self.latents} equals model.sequence_length: no context is left before the latents"


class SplitAttention(DoubleAttention):
    """Double attention whose context is cut into segments of m that do not see one another."""

    fields = ("latents", "segment_length")

    @property
    def context_pairs(self) -> int:
        """m per context position."""
        return self.context * self.segment_length

    def problems(self) -> Iterator[str]:
        """The context must be full segments."""
        yield from super().problems()
        if self.context % self.segment_length:
            yield (
                f"the context, model.sequence_length - model.latents = {self.sequence_length} - {self.latents} = "
                f"{self.context}, is not a multiple of model.segment_length {self.segment_length}"
            )


class CompressedDoubleAttention(DoubleAttention):
    """Layer 0 is double attention whose context output is compressed to c rows, which the other layers keep."""

    fields = ("latents", "compressed_context", "compression_residual")

    def output_rows(self, layer: int) -> int:
        """c + l, and l in the last layer."""
        return self.latents if layer == self.layers - 1 else self.compressed_context + self.latents

    def query_rows(self, layer: int) -> int:
        """Layer 0 has queries at all n positions, whose outputs are compressed."""
        return self.sequence_length if layer == 0 else self.output_rows(layer)

    def score_pairs(self, layer: int) -> float:
        """Double attention over n positions, then over c + l."""
        context = 0 if layer == self.layers - 1 else self.context if layer == 0 else self.compressed_context
        return context**2 + causal_pairs(self.latents, self.key_rows(layer))

    @property
    def compression_parameters(self) -> int:
        """Linear(n - l -> c) with bias."""
        return self.compressed_context * (self.context + 1)

    def problems(self) -> Iterator[str]:
        """Compression must compress, and somebody must read the result."""
        yield from super().problems()
        if self.layers < 2:
            yield f"model.layers is {self.layers}; compressed_double_attention reads its compressed context in layer 2"


GEOMETRIES: dict[str, type[Geometry]] = {
    "ecp": Ecp,
    "perceiver_ar": PerceiverAr,
    "double_attention": DoubleAttention,
    "compressed_double_attention": CompressedDoubleAttention,
    "split_attention": SplitAttention,
    "transformer": Transformer,
    "sliding_window": SlidingWindow,
    "longlora": LongLora,
}


def _grouped_pairs(positions: int, group: int) -> int:
    full, tail = divmod(positions, group)
    return full * causal_pairs(group, group) + causal_pairs(tail, tail)
