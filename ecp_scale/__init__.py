"""ECP language models (arXiv 2412.06106) on Megatron-core tensor parallelism and DeepSpeed ZeRO."""

__version__ = "0.1.0"
