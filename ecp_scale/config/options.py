"""From text to one ``Config``: values are checked against the types of the dataclasses by jsonargparse."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import jsonargparse

from ecp_scale.config import Config
from ecp_scale.config.renames import RENAMED_VALUES

SECTIONS: dict[str, Any] = {item.name: get_type_hints(Config)[item.name] for item in dataclasses.fields(Config)}

PARSE_ERRORS = (jsonargparse.ArgumentError, argparse.ArgumentError)


class Setting(NamedTuple):
    """One value for one field, and where it was given."""

    key: str
    value: str
    source: str


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Types and defaults of every field, and a description as it is written."""


@cache
def section_parser(description: str) -> jsonargparse.ArgumentParser:
    """Parser of every field, which also prints the help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s --config FILE [--section.key VALUE ...] [--deepspeed_config FILE] [--resume auto] [--dry-run]"
    parser = jsonargparse.ArgumentParser(
        description=description, usage=usage, exit_on_error=False, formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with the sections below, or the name of a preset")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON, or the name of one: zero1")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its counts, then exit")
    parser.add_argument("--resume", default="never", help="auto: continue from the newest complete checkpoint")
    parser.add_argument(
        "--allow-rate-jump",
        action="store_true",
        help="resume though the learning rate changes by more than a factor of 2",
    )
    parser.add_argument(
        "--init-from", metavar="DIR", help="model folder whose weights a new run begins with, optimizer and data afresh"
    )
    parser.add_argument("--verbose", action="store_true", help="show what libraries print, instead of RUN/logs")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    for action in parser._actions:
        if action.dest in SECTIONS:
            action.help = argparse.SUPPRESS  # jsonargparse would take a file for a section; we do not
    return parser


def build(parser: jsonargparse.ArgumentParser, settings: Sequence[Setting], problems: list[str]) -> Config:
    """The config of some settings, of which the last one of a field counts; values that do not fit become problems."""
    options = [f"--{item.key}={item.value}" for item in settings]
    try:
        values = parser.parse_args(options)
    except PARSE_ERRORS:
        good = []
        for item, option in zip(settings, options, strict=True):
            try:
                _field_parser(item.key).parse_args([option])
                good.append(option)
            except PARSE_ERRORS:
                now = RENAMED_VALUES.get(item.key, {}).get(item.value)
                expected = _values_of_field(item.key) if now is None else f"{now!r}, its present name"
                problems.append(f"{item.source}: {item.key} is {item.value!r}, expected {expected}")
        values = parser.parse_args(good)
    config = Config(**{name: section(**vars(values[name])) for name, section in SECTIONS.items()})
    return _with_home(config)


def _with_home(config: Config) -> Config:
    """``~`` at the beginning of a path is the user's home, which a shell does not see behind an equals sign."""
    data, training = config.data, config.training
    prefix, validation_prefix = at_home(data.prefix), at_home(data.validation_prefix)
    blend = data.blend
    if blend is not None:
        blend = {start: {str(at_home(name)): weight for name, weight in of.items()} for start, of in blend.items()}
    named = None if data.validation is None else {name: str(at_home(path)) for name, path in data.validation.items()}
    data = dataclasses.replace(data, prefix=prefix, validation_prefix=validation_prefix, blend=blend, validation=named)
    return dataclasses.replace(
        config,
        data=data,
        training=dataclasses.replace(training, output_dir=at_home(training.output_dir)),
        checkpoint=dataclasses.replace(config.checkpoint, mirror=at_home(config.checkpoint.mirror)),
    )


def at_home(path: str | None) -> str | None:
    """A path with ``~`` at its beginning written out."""
    return None if path is None else os.path.expanduser(path)  # noqa: PTH111, Path refuses homes of unknown users


def _values_of_field(key: str) -> str:
    section, name = key.split(".")
    hint = get_type_hints(SECTIONS[section])[name]
    return f"{'one of ' * (get_origin(hint) is Literal)}{values_of(hint)}"


@cache
def _field_parser(key: str) -> jsonargparse.ArgumentParser:
    """Parser of one field, to tell which of many does not fit."""
    section, name = key.split(".")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=get_type_hints(SECTIONS[section])[name])
    return parser


def values_of(hint: Any) -> str:
    """The values of a type as YAML has them: ``fp32, bf16`` or ``{whole number: text} or null``."""
    inside = get_args(hint)
    kind = get_origin(hint) or hint
    if kind is Literal:
        return ", ".join(map(str, inside))
    words = [values_of(each) for each in inside if each is not ...]
    if kind in (Union, UnionType):
        return " or ".join(words)
    if kind is dict:
        return f"{{{words[0]}: {words[1]}}}"
    if kind is tuple:
        return f"[{', '.join(words)}]"
    if kind is list:
        return f"[{words[0]}, ...]"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}[hint]
