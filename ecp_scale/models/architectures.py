"""The architectures: which attention pattern each layer has.

ecp is the paper's (arXiv 2412.06106, section 3). perceiver_ar (arXiv 2202.07765) and the three *_attention models are
its relatives there: the loss is taken on the last positions, the latents, and the positions before them are context.
transformer, sliding_window and longlora (arXiv 2309.12307) are baselines. All of them share the block of
``ecp_scale.models.blocks``; the numbers that belong to each are in ``ecp_scale.config.geometry``.
"""

from collections.abc import Callable

from ecp_scale.config import ModelConfig
from ecp_scale.models.patterns import (
    CausalSegments,
    CompressingContext,
    LatentQueries,
    LatentsAndContext,
    Pattern,
    ShiftedGroups,
)
from ecp_scale.parallel.context import ParallelContext

WHOLE = 2**30
"""Segment length that makes any sequence one segment. Kernels count positions in 32 bits."""


def ecp(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """Segments that see themselves and their left neighbour, in every layer."""
    return CausalSegments(config.geometry.segment_length, context=parallel.cp_group)


def perceiver_ar(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """Layer 0 reads everything into the latents; after that, a transformer over the latents."""
    return LatentQueries(config.geometry.latents) if layer == 0 else CausalSegments(WHOLE)


def double_attention(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """All positions in every layer; the last one need not compute a context that nobody reads."""
    latents = config.geometry.latents
    return LatentQueries(latents) if layer == config.layers - 1 else LatentsAndContext(latents)


def split_attention(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """Double attention whose context is cut into segments."""
    geometry = config.geometry
    if layer == config.layers - 1:
        return LatentQueries(geometry.latents)
    return LatentsAndContext(geometry.latents, geometry.segment_length)


def compressed_double_attention(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """Layer 0 compresses the context; after that, double attention over c + l rows."""
    geometry = config.geometry
    if layer == 0:
        sizes = (geometry.latents, geometry.context, geometry.compressed_context)
        return CompressingContext(*sizes, config.compression_residual, parallel)
    return (
        LatentQueries(geometry.latents)
        if layer == config.layers - 1
        else LatentsAndContext(geometry.latents, drop_context=False)
    )


def transformer(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """Full causal attention: one segment, whatever its length."""
    return CausalSegments(WHOLE)


def sliding_window(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """Segments of w, of whose left neighbour the last tokens that make up w are in view."""
    return CausalSegments(config.geometry.window, window=config.geometry.window, context=parallel.cp_group)


def longlora(config: ModelConfig, layer: int, parallel: ParallelContext) -> Pattern:
    """Groups, shifted for half of the heads."""
    return ShiftedGroups(config.geometry.group_length, config.key_value_heads or config.heads, parallel)


ARCHITECTURES: dict[str, Callable[[ModelConfig, int, ParallelContext], Pattern]] = {
    architecture.__name__: architecture
    for architecture in (
        ecp,
        perceiver_ar,
        double_attention,
        compressed_double_attention,
        split_attention,
        transformer,
        sliding_window,
        longlora,
    )
}
"""The pattern of each layer of each architecture."""
