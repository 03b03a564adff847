"""Draw loss, validation loss, learning rate, gradient norm and speed of runs against tokens.

    ecp-plot runs/first runs/second --output curves.png

Lines are smoothed, with what was measured behind them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser

PANELS = {
    "loss": "loss (nats per token)",
    "validation_loss": "validation loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
SPARSE = ("validation_loss", "validation_bits_per_byte", "validation_accuracy", "lr", "peak_memory_bytes")
"""What is drawn as it is, without a smoothed line."""


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving mean, without the pull of its beginning; ``weight`` is that of what came before."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total)
    return result


def records_of(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Records of some runs, by the name of each folder, or its path where two have one name.

    Raises:
        InputError: naming the folder that holds no run, or is named twice.
    """
    from ecp_scale.training.metrics import read_metrics, unreadable_metrics

    names = [folder.resolve().name for folder in folders]
    found = {}
    for folder, name in zip(folders, names, strict=True):
        records = read_metrics(folder)
        if not records:
            raise InputError(f"{folder}: expected a run with metrics.jsonl, found no record of a step")
        if unreadable := unreadable_metrics(folder):
            print(f"{folder}: {unreadable} lines of metrics.jsonl cannot be read")
        name = name if names.count(name) == 1 else str(folder)
        name = f" {name}" if name.startswith("_") else name  # which legends leave out
        if name in found:
            raise InputError(f"{folder} is named twice")
        found[name] = records
    return found


def legend(axes: Any) -> None:
    """A legend of names as they are: a dollar sign begins no formula."""
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)


def draw_panel(axes: Any, key: str, runs: dict[str, list[dict[str, Any]]], weight: float) -> None:
    """Draw one number of the records of some runs against tokens; runs that do not have it are left out."""
    for number, (name, records) in enumerate(runs.items()):
        points = [(record["tokens"] / 1e6, record[key]) for record in records if record.get(key) is not None]
        if not points:
            continue
        tokens, values = zip(*points, strict=True)
        color = f"C{number % 10}"
        if key in SPARSE:
            mark = "o-" if key.startswith("validation") else "-"
            axes.plot(tokens, values, mark, color=color, markersize=3, label=name)
        else:
            axes.plot(tokens, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(tokens, smoothed(values, weight), color=color, label=name)
    axes.grid(alpha=0.3)


def draw(runs: dict[str, list[dict[str, Any]]], weight: float, output: Path) -> None:
    """Draw the records of some runs by name."""
    from ecp_scale.evaluation.comparison import pyplot, save_picture

    figure, grid = pyplot().subplots(len(PANELS), 1, figsize=(8, 2.4 * len(PANELS)), layout="constrained", sharex=True)
    for axes, (key, label) in zip(grid, PANELS.items(), strict=True):
        draw_panel(axes, key, runs, weight)
        axes.set(ylabel=label)
    legend(grid[0])
    grid[-1].set(xlabel="tokens (millions)")
    figure.suptitle(", ".join(runs) if len(runs) < 4 else f"{len(runs)} runs", parse_math=False)
    save_picture(figure, output)


@input_errors_exit()
def main() -> None:
    """Read the command line and the runs, and draw."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=os.path.expanduser, metavar="RUN", help="run folders")
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FILE",
        help=".png, .svg or .pdf (default: RUN/curves.png of the first)",
    )
    parser.add_argument(
        "--smoothing", type=float, default=0.9, metavar="W", help="weight of earlier steps, 0 to 0.999 (default: 0.9)"
    )
    options = parser.parse_args()
    if not 0 <= options.smoothing <= 0.999:
        raise InputError(f"--smoothing is {options.smoothing}, expected a number from 0 to 0.999")

    folders = [Path(run) for run in options.runs]
    runs = records_of(folders)
    output = Path(options.output) if options.output else folders[0] / "curves.png"
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output {output}: expected a name that ends in .png, .svg or .pdf")
    try:
        draw(runs, options.smoothing, output)
    except ImportError as error:
        raise InputError("matplotlib is missing: pip install 'ecp-scale[export]'") from error
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror or error}") from error
    print(output)
