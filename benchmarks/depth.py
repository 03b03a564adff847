"""Depth: one small width, many layers, with and without the depth-scaled initialisation.

    python -m benchmarks.depth --prefix SHARDS --validation-prefix SHARDS --output DIR [--depths 6,12,...] [--steps 300]

Trains the `scaled` settings at every depth in this process, one run after another, and writes DIR/depth.json, a table
DIR/depth.md and the gradient norms DIR/depth.svg. Finished runs are not done again. Width, recipe and order of data are
the same for all; nothing is tuned per depth.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.options import count, counts
from ecp_scale.command_line import parse
from ecp_scale.errors import input_errors_exit
from ecp_scale.files import write_text
from ecp_scale.option_parser import OptionParser
from ecp_scale.training.metrics import read_metrics

INITIALIZATIONS = ("depth_scaled", "normal")
LAST_STEPS = 20


def recipe(options: argparse.Namespace, depth: int, initialization: str, folder: Path) -> list[str]:
    """Command line of one run."""
    values: dict[str, object] = {
        "model.preset": "scaled-125m",
        "model.vocab_size": "null",
        "model.layers": depth,
        "model.width": 64,
        "model.heads": 4,
        "model.key_value_heads": 2,
        "model.feed_forward_width": 128,
        "model.sequence_length": 256,
        "model.segment_length": 64,
        "model.initialization": initialization,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_tokens": 30 * 1024,
        "training.precision": "fp32",
        "training.micro_batch_size": 4,
        "training.global_batch_size": 4,
        "training.steps": options.steps,
        "training.validation_every_steps": options.steps,
        "training.validation_windows": 128,
        "checkpoint.every_steps": options.steps,
        "data.prefix": options.prefix,
        "data.validation_prefix": options.validation_prefix,
        "training.output_dir": folder,
    }
    return [f"--{key}={value}" for key, value in values.items()]


def run(options: argparse.Namespace, depth: int, initialization: str) -> dict[str, Any]:
    """Train one cell, or read it where it is done."""
    from ecp_scale.training.loop import train

    folder = Path(options.output) / f"{depth}-{initialization}"
    records = read_metrics(folder)
    if len(records) < options.steps:
        train(parse([*recipe(options, depth, initialization, folder), "--resume=auto"], ""))
        records = read_metrics(folder)
    norms = [record["grad_norm"] for record in records]
    return {
        "layers": depth,
        "initialization": initialization,
        "training_loss": statistics.fmean(record["loss"] for record in records[-LAST_STEPS:]),
        "validation_loss": records[-1]["validation_loss"],
        "largest_gradient_norm_after_warmup": max(norms[30:]),
        "median_gradient_norm": statistics.median(norms),
        "skipped_steps": records[-1]["skipped_steps"],
        "gradient_norms": norms,
        "losses": [record["loss"] for record in records],
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The figures as markdown."""
    lines = [
        "| layers | initialisation | training loss, last 20 steps | validation loss | gradient norm | largest |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        lines.append(
            f"| {cell['layers']} | {cell['initialization']} | {cell['training_loss']:.3f} | "
            f"{cell['validation_loss']:.3f} | {cell['median_gradient_norm']:.2f} | "
            f"{cell['largest_gradient_norm_after_warmup']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Gradient norms over the steps, one panel per initialisation."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "depth"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(INITIALIZATIONS), figsize=(10, 3.5), sharey=True)
    for axis, initialization in zip(axes, INITIALIZATIONS, strict=True):
        for cell in cells:
            if cell["initialization"] == initialization:
                axis.plot(cell["gradient_norms"], label=f"{cell['layers']} layers", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_title(initialization)
        axis.set_xlabel("step")
    axes[0].set_ylabel("gradient norm before clipping")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@input_errors_exit()
def main() -> None:
    """Train what is missing and write the report."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--validation-prefix", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--depths", type=counts, default="6,12,24,48,96", help="layers (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=300)
    options = parser.parse_args()
    cells = [run(options, depth, name) for depth in options.depths for name in INITIALIZATIONS]
    output = Path(options.output)
    write_text(output / "depth.json", json.dumps(cells) + "\n")
    write_text(output / "depth.md", table(cells))
    plot(cells, output / "depth.svg")
    print(table(cells))


if __name__ == "__main__":
    main()
