"""Attention of latents and their context: the paper's relatives of ECP (double attention and split attention).

The last positions are the latents. They see everything, causally among themselves. The context before them is read
without a causal mask, which is legal because no loss is taken there and every latent comes after it.
"""

import torch
from torch import Tensor

from ecp_scale.attention.key_value import KeyValue, segment_lengths
from ecp_scale.attention.pieces import documents_on
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
    if key_value.documents is not None:
        key_value = key_value._replace(documents=documents_on(key_value.documents, q.device))
    context = q.shape[-2] - latents
    lengths = segment_lengths(context, context_segment_length or context) if context else []
    *context_queries, latent_queries = q.split([*lengths, latents], dim=-2)
    *seen, _ = key_value.split([*lengths, latents])
    outputs = [
        attend(queries, segment, causal=False, dropout=context_dropout, backend=backend)
        for queries, segment in zip(context_queries, seen, strict=True)
    ]
    outputs.append(attend(latent_queries, key_value, dropout=dropout, backend=backend))
    return torch.cat(outputs, dim=-2)
