"""Small models with the `paper` and the `scaled` settings."""

import dataclasses
import random

import torch

from ecp_scale.command_line import load_preset
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.config.geometry import GEOMETRIES
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups

SMALL = {"layers": 3, "width": 24, "heads": 4, "sequence_length": 32, "segment_length": 8, "vocab_size": 29}
PAPER = dataclasses.replace(load_preset("paper-12l").model, **SMALL, feed_forward_width=48, vocab_multiple=5)
SCALED = dataclasses.replace(
    load_preset("scaled-125m").model, **SMALL, key_value_heads=2, feed_forward_width=40, vocab_multiple=5
)
BOTH = [PAPER, SCALED]
NAMES = ["paper", "scaled"]


def build(
    config: ModelConfig,
    groups: Groups,
    dtype: torch.dtype = torch.float64,
    attention: AttentionConfig | None = None,
) -> LanguageModel:
    """An initialised model in evaluation mode."""
    parallel = ParallelContext(groups.tensor, dtype)
    model = LanguageModel(config, parallel, attention)
    initialize(model, config, parallel, seed=1)
    return model.to(groups.device).eval()


def random_tokens(config: ModelConfig, length: int, batch: int = 2) -> torch.Tensor:
    """Token ids (batch, length)."""
    return torch.randint(config.known_vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


ARCHITECTURES = tuple(GEOMETRIES)
CAUSAL = tuple(name for name, geometry in GEOMETRIES.items() if geometry.streams)
LATENT = tuple(name for name, geometry in GEOMETRIES.items() if not geometry.streams)


def variant(config: ModelConfig, architecture: str, **changes: object) -> ModelConfig:
    """The same settings with another architecture; the paper's relatives of ecp norm their keys and values."""
    normed = config.tied_key_value and architecture in LATENT
    changed = {"architecture": architecture, "key_value_norm": normed, "allow_short_receptive_field": True, **changes}
    result = dataclasses.replace(config, **changed)
    assert result.problems() == []
    return result


def random_shape(architecture: str, seed: int) -> dict[str, int]:
    """Random sizes that fit the architecture."""
    rng = random.Random(f"{architecture}/{seed}")
    m = rng.randint(2, 5)
    context, latents = m * rng.randint(1, 3), m * rng.randint(1, 4)
    n = context + latents
    return {
        "layers": rng.randint(2, 3),
        "sequence_length": n,
        "segment_length": m,
        "latents": latents,
        "compressed_context": rng.randint(1, context),
        "window": rng.randint(1, n),
        "group_length": 2 * rng.randint(1, n // 2),
    }
