"""Narrow copies of a run's model, for what is tried at small sizes in the run's own layout."""

import dataclasses
from typing import Any

from ecp_scale.config import Config, ModelConfig


def narrow_model(config: Config, head_width: int, positions: int, **sizes: Any) -> ModelConfig:
    """The model with its heads and architecture, narrow and short.

    Args:
        config: the run.
        head_width: E of the copy.
        positions: of a segment, for each tensor-parallel rank, which share them.
        sizes: other fields of the copy.
    """
    parallel = config.parallel
    segment = positions * parallel.tensor
    shared: dict[str, Any] = {
        "width": head_width * config.model.heads,
        # At least two segments for every rank that shares a sequence.
        "sequence_length": 4 * segment * parallel.context,
        "segment_length": segment,
        "latents": None,
        "compressed_context": None,
        "window": 2 * segment,
        "group_length": None,
        "allow_short_receptive_field": True,
    }
    return dataclasses.replace(config.model, **shared, **sizes)
