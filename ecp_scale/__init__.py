"""ECP language models (arXiv 2412.06106) on Megatron-core tensor parallelism and DeepSpeed ZeRO."""

import warnings

__version__ = "0.1.0"

# Megatron-core warns at import, on each rank, of every optional kernel library that it does not find; no user can
# act on that. Here, because it must come before Megatron-core is imported.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
