"""Small models with the `paper` and the `scaled` settings."""

import dataclasses

import torch

from ecp_scale.command_line import load_preset
from ecp_scale.config import ModelConfig
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.linear import Shard
from ecp_scale.parallel.groups import Groups

SMALL = {"layers": 3, "width": 24, "heads": 4, "sequence_length": 32, "segment_length": 8, "vocab_size": 29}
PAPER = dataclasses.replace(load_preset("paper-12l").model, **SMALL, feed_forward_width=48, vocab_multiple=5)
SCALED = dataclasses.replace(
    load_preset("scaled-125m").model, **SMALL, key_value_heads=2, feed_forward_width=40, vocab_multiple=5
)
BOTH = [PAPER, SCALED]
NAMES = ["paper", "scaled"]


def build(config: ModelConfig, groups: Groups, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """An initialised model in evaluation mode."""
    shard = Shard(groups.tensor, dtype)
    model = LanguageModel(config, shard)
    initialize(model, config, shard, seed=1)
    return model.to(groups.device).eval()


def random_tokens(config: ModelConfig, length: int, batch: int = 2) -> torch.Tensor:
    """Token ids (batch, length)."""
    return torch.randint(config.known_vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))
