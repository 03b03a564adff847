"""Attention of latents and their context: the paper's relatives of ECP (double attention and split attention).

The last positions are the latents. They see everything, causally among themselves. The context before them is read
without a causal mask, which is legal because no loss is taken there and every latent comes after it.
"""

import torch
from torch import Tensor

from ecp_scale.attention.calls import Pattern
from ecp_scale.attention.kernels import Settings, kernel_for
from ecp_scale.attention.key_value import KeyValue, segment_lengths
from ecp_scale.attention.pieces import attend_by_pieces, documents_on
from ecp_scale.attention.sdpa import attend
from ecp_scale.config import AttentionBackend


def latent_attention(
    q: Tensor,
    key_value: KeyValue,
    latents: int,
    context_segment_length: int | None = None,
    *,
    dropout: float = 0.0,
    context_dropout: float = 0.0,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Attend from the context to its own segment in both directions, and from the latents to everything.

    Args:
        q: queries (B, H, N, E) of all positions.
        key_value: keys, values and documents of the same positions.
        latents: how many of the last positions are latents.
        context_segment_length: positions per segment of the context; None makes it one segment.
        dropout: probability of dropping an attention weight of the latents.
        context_dropout: the same for the context.
        backend: how it is computed.

    Returns:
        The attended values (B, H, N, E).
    """
    context = q.shape[-2] - latents
    if not context:
        return attend(q, key_value, dropout=dropout, backend=backend)
    of_context, of_latents = q.split([context, latents], dim=-2)
    seen, _ = key_value.split([context, latents])
    return torch.cat(
        [
            # The documents as they came: what is made of them is made once for all layers.
            *_attend_context(
                of_context,
                seen._replace(documents=key_value.documents),
                context_segment_length or context,
                context_dropout,
                backend,
            ),
            attend(of_latents, key_value, dropout=dropout, backend=backend),
        ],
        dim=-2,
    )


def _attend_context(
    q: Tensor, seen: KeyValue, segment_length: int, dropout: float, backend: AttentionBackend
) -> list[Tensor]:
    """Every segment of the context, in both directions; the documents of ``seen`` may go on behind it."""
    keys, values, documents = seen
    settings, context = Settings(dropout=dropout), seen.positions
    if documents is not None:
        kernel = kernel_for(q, keys, settings, True) if backend in ("auto", "flash") else None
        pattern = Pattern(context, context, segment_length, min(segment_length, context), look_back=False)
        attended = attend_by_pieces(q, seen, pattern, kernel, settings, causal=False)
        if attended is not None:
            return [attended]
        seen = KeyValue(keys, values, documents_on(documents, q.device)[:, :context])
    lengths = segment_lengths(context, segment_length)
    return [
        attend(queries, segment, causal=False, dropout=dropout, backend=backend)
        for queries, segment in zip(q.split(lengths, dim=-2), seen.split(lengths), strict=True)
    ]
