"""Fixed tokens, whose loss depends on every weight but unread rows of the embedding, and on every logit.

Digests show that weights are what they were; this, that a model computes with them what it did.
"""

import torch
from torch import Tensor

from ecp_scale.config import ModelConfig
from ecp_scale.models.language_model import LanguageModel

STEP = 2654435761
"""Odd, and near 2^32 divided by the golden ratio: its multiples modulo 2^32 are spread evenly."""
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference of the probe's loss, by the precision of either model, beyond which they are not the same."""


def probe_ids(config: ModelConfig) -> Tensor:
    """One training window and its last target (n + 1,), int64, spread over the vocabulary."""
    spread = torch.arange(config.sequence_length + 1) * STEP % 2**32
    return spread * config.known_vocab_size // 2**32


@torch.no_grad()
def probe_loss(model: LanguageModel) -> float:
    """Mean loss of the probe's trained targets, in nats per token, of a model in evaluation mode."""
    ids = probe_ids(model.config)[None].to(next(model.parameters()).device)
    losses: Tensor = model(ids[:, :-1], ids[:, 1:])[1]
    return losses.double().mean().item()


def is_same(found: float, expected: float, *precisions: str) -> bool:
    """Whether two losses of the probe are those of one model, by the coarsest of some precisions."""
    return abs(found - expected) <= max(TOLERANCES[name] for name in precisions) * abs(expected)
