"""Blocks and language models on Megatron-core's parallel layers; groups come as arguments."""
