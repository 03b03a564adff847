"""The configuration of a run: frozen dataclasses, what they count, and every check on them. Imports no torch."""

from ecp_scale.config.data import DataConfig
from ecp_scale.config.model import ModelConfig
from ecp_scale.config.optimizer import OptimizerConfig
from ecp_scale.config.parallel import ParallelConfig, Recompute
from ecp_scale.config.run import (
    AttentionBackend,
    AttentionConfig,
    CheckpointConfig,
    Config,
    LoggingConfig,
)
from ecp_scale.config.training import TrainingConfig

__all__ = [
    "AttentionBackend",
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recompute",
    "TrainingConfig",
]
