"""Fields of the config that had other names: an error tells a user the new one, and files on disk are read under it."""

from typing import Any

RENAMED_FIELDS = {
    "model.allow_short_reach": "model.allow_short_receptive_field",
    "optimizer.minimum_ratio": "optimizer.min_lr_ratio",
    "data.untrained_targets": "data.loss_ignore_ids",
    "checkpoint.keep": "checkpoint.keep_last",
}
"""Former name -> name."""
ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "min_lr": "optimizer.min_lr_ratio",
    "betas": "optimizer.beta1",
    "clip_grad": "optimizer.gradient_clipping",
    "max_grad_norm": "optimizer.gradient_clipping",
    "lr_scheduler": "optimizer.schedule",
    "hidden_size": "model.width",
    "n_embd": "model.width",
    "dim": "model.width",
    "num_layers": "model.layers",
    "n_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "n_heads": "model.heads",
    "num_key_value_heads": "model.key_value_heads",
    "num_query_groups": "model.key_value_heads",
    "ffn_hidden_size": "model.feed_forward_width",
    "intermediate_size": "model.feed_forward_width",
    "seq_length": "model.sequence_length",
    "seq_len": "model.sequence_length",
    "max_position_embeddings": "model.sequence_length",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "train_iters": "training.steps",
    "max_steps": "training.steps",
    "train_tokens": "training.tokens",
    "max_tokens": "training.tokens",
    "tensor_model_parallel_size": "parallel.tensor",
    "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence",
    "data_path": "data.prefix",
    "save": "training.output_dir",
    "save_interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "async_save": "checkpoint.asynchronous",
    "dtype": "training.precision",
    "bf16": "training.precision",
}
"""What other training stacks call a field -> the field."""
RENAMED_VALUES = {"attention.backend": {"segments": "sdpa", "merged": "flash"}}
"""Field -> former value -> value."""


def renamed_fields(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A section of a config that an earlier version wrote, under the names of this one."""
    found = {}
    for name, value in values.items():
        field = RENAMED_FIELDS.get(f"{section}.{name}", f"{section}.{name}")
        now = RENAMED_VALUES.get(field, {})
        found[field.removeprefix(f"{section}.")] = now.get(value, value) if isinstance(value, str) else value
    return found
