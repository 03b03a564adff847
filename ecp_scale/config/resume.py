"""Whether a resume may change a field of the config."""

from typing import Literal, TypeAlias

from ecp_scale.config.model import GEOMETRY_FIELDS

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
    "data.validation": NEVER_MATTERS,
    "optimizer.name": FIXED,
    "training.output_dir": NEVER_MATTERS,
    "training.seed": FIXED,
    "training.validation_every_steps": NEVER_MATTERS,
    "training.validation_windows": NEVER_MATTERS,
    "training.max_skipped_steps": NEVER_MATTERS,
    "training.spike_score": NEVER_MATTERS,
    "training.on_spike": NEVER_MATTERS,
    "training.spike_skip_steps": NEVER_MATTERS,
}
"""Where a field differs from its section."""


def rule(field: str) -> Rule:
    """What a resume does with another value of a field of the config, such as ``optimizer.weight_decay``."""
    return FIELD_RULES.get(field, SECTION_RULES[field.partition(".")[0]])
