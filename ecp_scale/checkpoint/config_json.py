"""What config.json of a model folder says, in every version of it."""

import dataclasses
from pathlib import Path
from typing import Any

from ecp_scale.checkpoint.hugging_face import ATTENTION, NOT_THEIRS
from ecp_scale.config import ModelConfig
from ecp_scale.errors import InputError

FORMAT = "ecp-scale"
FORMAT_VERSION = 4
READABLE = (2, 3, 4)
"""Version 4 is a folder of Hugging Face's too; 3 and 2 have sections in config.json, and ``format`` beside them, and 2
has former names of some fields (``ecp_scale.config.renames``)."""
OURS = "ecp_scale"
"""Key of what only we read in config.json."""


def sections(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """What config.json says, as sections: ``model``, ``attention``, ``tokenizer``, ``step``, ``tokens``.

    Raises:
        InputError: if it is of another kind of model, or of a version that is not known.
    """
    ours = content if "format" in content else content.get(OURS)
    if ours is None or content.get("model_type", "ecp") != "ecp" or content.get("format", FORMAT) != FORMAT:
        kind = content.get("format") or content.get("model_type")
        raise InputError(f"{path}: a model of the kind {kind!r}, expected one of ecp-convert, or made from such a one")
    if ours["format_version"] not in READABLE:
        raise InputError(f"{path}: format version {ours['format_version']}, expected one of {READABLE}")
    if ours is content:
        return content
    known = {item.name for item in dataclasses.fields(ModelConfig)} - set(NOT_THEIRS)
    return {
        **ours,
        "dtype": content.get("dtype", "float32"),
        "model": {**ours["model"], **{name: content[name] for name in known if name in content}},
        "attention": {name: content[name] for name in ATTENTION},
    }
