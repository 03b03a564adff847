"""Fields of the config that had other names: an error tells a user the new one, and files on disk are read under it."""

from typing import Any

RENAMED_FIELDS = {
    "model.allow_short_reach": "model.allow_short_receptive_field",
    "optimizer.minimum_ratio": "optimizer.min_lr_ratio",
    "data.untrained_targets": "data.loss_ignore_ids",
}
"""Former name -> name."""
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
