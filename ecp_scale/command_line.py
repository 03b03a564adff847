"""From command line, YAML and preset to one ``Config``, with every mistake reported at once.

Later wins: defaults of the dataclasses, the preset, the config file, the command line. Every value takes the same road:
it becomes an option ``--section.key=value``, which jsonargparse checks against the type of the field.
"""

import argparse
import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ecp_scale.config import Config
from ecp_scale.config.options import SECTIONS, Setting, at_home, build, section_parser
from ecp_scale.config.renames import ELSEWHERE, RENAMED_FIELDS, renamed_fields
from ecp_scale.errors import InputError
from ecp_scale.zero import json_config

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Request:
    """What a training command line asks for."""

    config: Config
    deepspeed_path: str | None
    deepspeed: dict[str, Any]
    dry_run: bool
    resume: bool
    world_size: int
    allow_rate_jump: bool = False
    init_from: str | None = None
    """Model folder with the weights that a new run begins with."""
    verbose: bool = False
    notes: tuple[str, ...] = ()
    """What the command line says without effect."""


def parse(
    argv: Sequence[str],
    description: str,
    required: Sequence[str] = (),
    world_size: int | None = None,
    options: Sequence[str] = (),
) -> Request:
    """Read a training command line; fields named in ``required`` must be set unless it is a dry run, of ``a|b`` one.

    ``world_size`` is that of the launch to come; None takes this process's own. ``options`` are those of the program
    besides, which an error may suggest.

    Raises:
        InputError: listing every problem of the files and of the command line together.
    """
    parser = section_parser(description)
    known, rest = _top_level_parser().parse_known_args(argv)
    known.config, known.deepspeed_config = at_home(known.config), at_home(known.deepspeed_config)
    if known.help:
        parser.print_help()
        raise SystemExit(0)
    launched = world_size is not None or "WORLD_SIZE" in os.environ
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))

    problems: list[str] = []
    settings = _file_settings(known.config, problems) if known.config else []
    beside = [*options, *(name for action in _top_level_parser()._actions for name in action.option_strings)]
    asked = _command_line_settings(rest, problems, [name.removeprefix("--") for name in beside])
    settings += asked
    config = build(parser, _above_presets(settings, problems), problems)
    if config.training.tokens is not None and any(item.key == "training.steps" for item in asked):
        problems.append(
            f"{COMMAND_LINE}: training.steps is {config.training.steps}, but training.tokens {config.training.tokens} "
            "decides the length of the run; change that, or set it to null"
        )
    path = known.deepspeed_config
    content = json_config.default(config, world_size) if path is None else json_config.read(path)
    # A dry run without a launcher has no world size to check against.
    problems += config.problems(None if known.dry_run and not launched else world_size)
    problems += json_config.problems(content, known.deepspeed_config, config, world_size)
    if not known.dry_run:
        for key in required:
            if all(_value(config, choice) is None for choice in key.split("|")):
                problems.append(f"{key.replace('|', ' or ')} is not set")
        problems += _moved(known.config, config, rest)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{count} in the configuration:\n" + "\n".join(f"  - {text}" for text in problems))
    idle = config.without_effect([item.key for item in asked])
    return Request(
        config=config.with_length(),
        deepspeed_path=known.deepspeed_config,
        deepspeed=content,
        dry_run=known.dry_run,
        resume=known.resume == "auto",
        world_size=world_size,
        allow_rate_jump=known.allow_rate_jump,
        init_from=at_home(known.init_from),
        verbose=known.verbose,
        notes=(*(f"--{field} has no effect with {why}" for field, why in idle), *config.remarks()),
    )


def _moved(path: str | None, config: Config, rest: Sequence[str]) -> list[str]:
    """A run folder's own config names another run folder: the folder was moved or copied."""
    if path is None or any(token.startswith("--training.output_dir") for token in rest):
        return []
    folder, named = Path(path).absolute().parent, config.training.output_dir
    if not _is_of_a_run(path) or named is None or Path(named).resolve() == folder.resolve():
        return []
    return [
        f"{path} lies in a run folder, but its training.output_dir is {named}; pass --training.output_dir {folder} to "
        "go on there, or another folder"
    ]


def _is_of_a_run(path: str) -> bool:
    """Whether a file is the resolved config that a run has written into its folder."""
    return Path(path).name == "config.yaml" and (Path(path).absolute().parent / "metrics.jsonl").exists()


def preset_names() -> list[str]:
    """Names that model.preset takes."""
    folder = resources.files("ecp_scale") / "config" / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_path(name: str) -> Path:
    """File of a preset.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in preset_names():
        raise InputError(f"model.preset is {name!r}, expected one of {', '.join(preset_names())}")
    return Path(str(resources.files("ecp_scale") / "config" / "presets" / f"{name}.yaml"))


def load_preset(name: str) -> Config:
    """The config of a preset alone.

    Raises:
        InputError: if the preset does not exist or is not valid.
    """
    # A dry run: a preset that is laid out for many ranks does not fit this process alone.
    return parse([f"--model.preset={name}", "--dry-run"], "").config


def to_yaml(config: Config) -> str:
    """The whole config, as a file that ``--config`` reads."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _top_level_parser() -> argparse.ArgumentParser:
    # Only these are not fields of a section; local_rank is what the deepspeed launcher adds.
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config")
    parser.add_argument("--deepspeed_config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume", choices=("auto", "never"), default="never")
    parser.add_argument("--allow-rate-jump", action="store_true")
    parser.add_argument("--init-from")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--local_rank", "--local-rank")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _file_settings(path: str, problems: list[str]) -> list[Setting]:
    if path in preset_names() and not Path(path).is_file():
        path = str(preset_path(path))
    elif not Path(path).exists() and "/" not in path:
        raise InputError(f"--config {path}: no such file, and no preset of that name: {', '.join(preset_names())}")
    try:
        content = yaml.load(Path(path).read_text(), _OnceLoader)
        json.dumps(content, default=str, skipkeys=True)  # refuses what holds itself
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config file {path}: not valid UTF-8 at byte {error.start}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise InputError(f"config file {path}: not valid YAML, {' '.join(str(error).split())}") from error
    if content is None:
        raise InputError(f"config file {path}: is empty, expected sections {', '.join(SECTIONS)}")
    if not isinstance(content, dict):
        raise InputError(f"config file {path}: found {type(content).__name__}, expected sections {', '.join(SECTIONS)}")
    settings = []
    for section, values in content.items():
        if section not in SECTIONS:
            problems.append(f"{path}: unknown section {section!r}{_did_you_mean(str(section), SECTIONS)}")
        elif values is None:
            continue  # all that was in it is a comment
        elif not isinstance(values, dict):
            problems.append(f"{path}: section {section} holds {values!r}, expected keys and values")
        else:
            if _is_of_a_run(path):  # an earlier version may have written it
                values = renamed_fields(section, values)
            # Text goes as it is; of everything else JSON is YAML on one line.
            for key, value in values.items():
                text = value if isinstance(value, str) else json.dumps(_plain_keys(value), default=str)
                settings.append(Setting(f"{section}.{key}", text, path))
    return [item for item in settings if _is_known(item.key, item.source, problems)]


class _OnceLoader(yaml.SafeLoader):
    """YAML whose keys stand once: of two, a reader may have seen the other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises: ConstructorError at the second of two equal keys."""
        known: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in known:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            known.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def _plain_keys(value: Any) -> Any:
    """YAML's dates and the like are no keys in JSON."""
    if isinstance(value, dict):
        return {key if isinstance(key, int | str) else str(key): _plain_keys(item) for key, item in value.items()}
    return [_plain_keys(item) for item in value] if isinstance(value, list) else value


def _above_presets(settings: list[Setting], problems: list[str]) -> list[Setting]:
    """The settings on top of the preset that they name, which may stand on another one itself."""
    top = settings
    while (preset := next((item.value for item in reversed(top) if item.key == "model.preset"), "null")) != "null":
        top = _file_settings(str(preset_path(preset)), problems)
        settings = top + settings
    return settings


def _command_line_settings(tokens: list[str], problems: list[str], options: Sequence[str]) -> list[Setting]:
    settings = []
    remaining = list(tokens)
    while remaining:
        token = remaining.pop(0)
        if not token.startswith("--"):
            problems.append(f"{COMMAND_LINE}: {token!r} is not an option; expected --section.key value")
            continue
        key, equals, value = token.removeprefix("--").partition("=")
        if not equals:
            has_value = remaining and not remaining[0].startswith("--")
            value = remaining.pop(0) if has_value else ""
        if _is_known(key, COMMAND_LINE, problems, options):
            if value == "":
                problems.append(f"{COMMAND_LINE}: --{key} needs a value")
            else:
                settings.append(Setting(key, value, COMMAND_LINE))
    return settings


def _is_known(key: str, source: str, problems: list[str], options: Sequence[str] = ()) -> bool:
    names = [f"{name}.{item.name}" for name, section in SECTIONS.items() for item in dataclasses.fields(section)]
    if key in names:
        return True
    if key in RENAMED_FIELDS:
        problems.append(f"{source}: {key} is now {RENAMED_FIELDS[key]}")
    else:
        elsewhere = ELSEWHERE.get(key.rpartition(".")[2].replace("-", "_"))
        hint = f"; did you mean {elsewhere!r}?" if elsewhere else _did_you_mean(key, [*names, *options])
        problems.append(f"{source}: unknown key {key!r}{hint}")
    return False


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
