"""Whether a run continues the one that saved a checkpoint: what must be the same, and what may change."""

import dataclasses
from typing import Any

from ecp_scale.checkpoint.folder import CheckpointRecord
from ecp_scale.config import Config, ModelConfig
from ecp_scale.config.resume import FIXED, rule
from ecp_scale.data.blend import SKIPPED, Blend
from ecp_scale.errors import InputError

NEWER_FIELDS: dict[str, dict[str, Any]] = {
    "model": {"task": "language", "pooling": "mean", "inputs": "tokens", "learnt_positions": False},
    "data": {SKIPPED: []},
}
"""What checkpoints of earlier versions do not have, by section, and what it was."""
DATA_FIELDS = {
    "seed": "training.seed",
    "tokenizer_sha256": "data.prefix or data.blend: the hash of the tokenizer",
    "corpora_sha256": "data.prefix or data.blend: the hash of the shards",
    "corpora_tokens": "data.prefix or data.blend: the number of tokens",
}
"""Entries of ``data`` as users know them."""


def identity(config: Config, blend: Blend, tokens: int) -> dict[str, Any]:
    """What a checkpoint after ``tokens`` tokens says about its run, for a resume to compare."""
    return {
        "model": dataclasses.asdict(config.model),
        "attention": dataclasses.asdict(config.attention),
        "optimizer": dataclasses.asdict(config.optimizer),
        "data": {
            **blend.history(tokens),
            "tokenizer_sha256": blend.corpora[0].tokenizer.sha256,
            "seed": config.training.seed,
        },
    }


def check_continues(record: CheckpointRecord, folder: object, now: dict[str, Any]) -> None:
    """Refuse to continue another run.

    Args:
        record: of the checkpoint.
        folder: to name in an error.
        now: ``identity`` of the run that would go on.

    Raises:
        InputError: listing what differs and must not.
    """
    differences = []
    length = now["model"]["sequence_length"]
    if record.model.get("sequence_length", length) != length:
        # The order of windows of another length is another one: what was skipped in the first has no place in it.
        record = dataclasses.replace(record, data=record.data | {SKIPPED: []})
    for section, values in now.items():
        saved = getattr(record, section)
        for name, value in values.items():
            field = f"{section}.{name}"
            # What earlier versions did not write is not compared, but for newer fields that change what weights there
            # are, or which samples were read; all entries of ``data`` are content.
            known = NEWER_FIELDS.get(section, {}) | saved
            may_differ = name not in known or (section != "data" and rule(field) != FIXED)
            if not may_differ and known[name] != value:
                asked = DATA_FIELDS.get(name, field) if section == "data" else field
                differences.append(f"{asked} was {known[name]!r} and is now {value!r}")
    if not differences:
        differences = ModelConfig(**now["model"]).weights_problems(ModelConfig(**record.model))
    if differences:
        raise InputError(f"{folder} cannot be continued by this run:\n" + "\n".join(f"  - {x}" for x in differences))
