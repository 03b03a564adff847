"""The points of a comparison: values of fields, and sizes of the model."""

import itertools
from collections.abc import Sequence

from ecp_scale.command_line import Request
from ecp_scale.config import Config
from ecp_scale.errors import InputError

NOT_IN_A_GRID = ("model.architecture", "training.seed", "training.output_dir")
OF_A_SIZE = ("model.layers", "model.width", "model.heads", "model.key_value_heads", "model.feed_forward_width")


def points_of(grid: Sequence[str], sizes: str | None, request: Request) -> dict[str, list[str]]:
    """Options of every point of the grid, by its name.

    Args:
        grid: FIELD=VALUE,VALUE for each axis.
        sizes: layers x width, separated by commas.
        request: of the base.

    Raises:
        InputError: naming what cannot be tried.
    """
    axes: list[list[tuple[str, list[str]]]] = []
    for text in grid:
        field, equals, values = text.partition("=")
        if not equals or "." not in field or not all(values.split(",")):
            raise InputError(f"--grid is {text!r}, expected section.field=VALUE,VALUE")
        if field in NOT_IN_A_GRID or (sizes is not None and field in OF_A_SIZE):
            raise InputError(f"--grid names {field}, which is set by --architectures, --seeds, --output or --sizes")
        if "/" in values:
            raise InputError(f"--grid is {text!r}: a value is the name of a folder, and cannot have a slash")
        words = values.split(",")
        if len({number_of(word) for word in words}) < len(words):
            raise InputError(f"--grid is {text!r}: two values are the same")
        axes.append([(f"{field.split('.')[1]}={value}", [f"--{field}={value}"]) for value in words])
    if sizes is not None:
        axes.append([(size, options_of_size(size, request.config)) for size in sizes.split(",")])
    found = {}
    for choice in itertools.product(*axes):
        name = "-".join(name for name, _ in choice)
        if name in found:
            raise InputError(f"--grid and --sizes make {name} twice")
        found[name] = [word for _, words in choice for word in words]
    return found


def check_effect(grid: Sequence[str], cells: Sequence[Config]) -> None:
    """Refuse an axis that changes nothing in any cell.

    Raises:
        InputError: naming the field.
    """
    for text in grid:
        field, _, values = text.partition("=")
        idle = [cell.without_effect([field]) for cell in cells]
        if all(idle) and "," in values:
            raise InputError(f"--grid is {text!r}: {field} has no effect with {idle[0][0][1]}")


def number_of(word: str) -> float | str:
    """A number where a word is one: ``1e-3`` and ``0.001`` are the same."""
    try:
        return float(word)
    except ValueError:
        return word


def options_of_size(size: str, base: Config) -> list[str]:
    """Options that make the base as large as ``4x128`` says, with heads of the same width."""
    layers, times, width = size.partition("x")
    if not (times and layers.isdecimal() and width.isdecimal()):
        raise InputError(f"--sizes names {size!r}, expected layers x width, as 4x128")
    model = base.model
    if int(width) % model.head_width or not int(width):
        raise InputError(
            f"--sizes names {size!r}: heads keep their width, and {width} is no multiple of {model.head_width}"
        )
    heads = int(width) // model.head_width
    shared = model.heads // (model.key_value_heads or model.heads)
    return [
        f"--model.layers={layers}",
        f"--model.width={width}",
        f"--model.heads={heads}",
        f"--model.key_value_heads={max(1, heads // shared)}",
        f"--model.feed_forward_width={-(-int(width) * model.feed_forward_width // model.width // 8) * 8}",
    ]
