"""ECP language models (arXiv 2412.06106) on Megatron-core tensor parallelism and DeepSpeed ZeRO."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecp_scale.api import Model, load_model
    from ecp_scale.attention import segment_attention
    from ecp_scale.config import ModelConfig
    from ecp_scale.data.dataset import TokenDataset
    from ecp_scale.errors import InputError
    from ecp_scale.models.language_model import LanguageModel
    from ecp_scale.parallel.context import ParallelContext

__version__ = "0.1.0"

# Megatron-core warns at import, on each rank, of every optional kernel library that it does not find; no user can
# act on that. Here, because it must come before Megatron-core is imported.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")

_HOMES = {
    "InputError": "ecp_scale.errors",
    "LanguageModel": "ecp_scale.models.language_model",
    "Model": "ecp_scale.api",
    "ModelConfig": "ecp_scale.config",
    "ParallelContext": "ecp_scale.parallel.context",
    "TokenDataset": "ecp_scale.data.dataset",
    "load_model": "ecp_scale.api",
    "segment_attention": "ecp_scale.attention",
}
__all__ = [
    "InputError",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "ParallelContext",
    "TokenDataset",
    "load_model",
    "segment_attention",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import on first use: the programs' --help needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
