"""Whether a run continues the one that saved a checkpoint: what must be the same, and what may change."""

import dataclasses
from typing import Any, Literal, TypeAlias

from ecp_scale.checkpoint.folder import CheckpointRecord
from ecp_scale.config import Config, ModelConfig
from ecp_scale.config.model import GEOMETRY_FIELDS
from ecp_scale.data.blend import Blend
from ecp_scale.errors import InputError

Rule: TypeAlias = Literal["fixed", "may change", "never matters"]
"""A change is refused; takes effect from the next step on; or has no effect on the weights at all."""
FIXED: Rule = "fixed"
MAY_CHANGE: Rule = "may change"
NEVER_MATTERS: Rule = "never matters"

SECTION_RULES: dict[str, Rule] = {
    "model": FIXED,
    "attention": FIXED,
    "parallel": MAY_CHANGE,
    "data": MAY_CHANGE,
    "optimizer": MAY_CHANGE,
    "training": MAY_CHANGE,
    "checkpoint": NEVER_MATTERS,
    "logging": NEVER_MATTERS,
}
FIELD_RULES: dict[str, Rule] = {
    "model.preset": NEVER_MATTERS,
    "model.allow_short_receptive_field": NEVER_MATTERS,
    "model.dropout": MAY_CHANGE,
    # If the weights allow it, see ModelConfig.weights_problems.
    **{f"model.{name}": MAY_CHANGE for name in GEOMETRY_FIELDS},
    "attention.backend": MAY_CHANGE,  # all compute the same, up to rounding
    "parallel.timeout_seconds": NEVER_MATTERS,
    # Where the same text lies now; its content is compared by hash, up to the tokens that were read.
    "data.prefix": NEVER_MATTERS,
    "data.validation_prefix": NEVER_MATTERS,
    "optimizer.name": FIXED,
    "training.output_dir": NEVER_MATTERS,
    "training.seed": FIXED,
    "training.validation_every_steps": NEVER_MATTERS,
    "training.validation_windows": NEVER_MATTERS,
    "training.max_skipped_steps": NEVER_MATTERS,
}
"""Where a field differs from its section."""


def rule(field: str) -> Rule:
    """What a resume does with another value of a field of the config, such as ``optimizer.weight_decay``."""
    return FIELD_RULES.get(field, SECTION_RULES[field.partition(".")[0]])


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
    for section, values in now.items():
        saved = getattr(record, section)
        for name, value in values.items():
            field = f"{section}.{name}"
            # What earlier versions did not write is not compared; all entries of ``data`` are content.
            may_differ = name not in saved or (section != "data" and rule(field) != FIXED)
            if not may_differ and saved[name] != value:
                differences.append(f"{field} was {saved[name]!r} and is now {value!r}")
    if not differences:
        differences = ModelConfig(**now["model"]).weights_problems(ModelConfig(**record.model))
    if differences:
        raise InputError(f"{folder} cannot be continued by this run:\n" + "\n".join(f"  - {x}" for x in differences))
