"""Architectures side by side: the figures of each trained cell, and what they say over seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Protocol = Literal["stream", "sliding", "release"]
CURVE_LABEL = "validation loss (nats per trained token)"


@dataclass(frozen=True)
class Cell:
    """One architecture, at one point of a grid, trained with one seed.

    ``curve`` holds [tokens, validation loss] of the run; FLOPs are per token of a training window; speed is the median
    over the steps; memory is the peak of rank 0, on a CPU all resident memory of the process. A cell has figures of a
    text; or of labels, ``label_accuracy``; or of a probe: ``accuracy`` holds [distance, share of symbols].
    """

    architecture: str
    seed: int
    protocol: str
    parameters: int
    flops_per_token: float
    trained_positions: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    curve: list[list[float]]
    token_perplexity: float = math.nan
    word_perplexity: float = math.nan
    bits_per_byte: float = math.nan
    label_accuracy: float = math.nan
    point: str = ""
    receptive_field: int = 0
    accuracy: list[list[float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What cells of all seeds have in common."""
        return f"{self.architecture} {self.point}".rstrip()

    @property
    def flops(self) -> float:
        """Floating-point operations of the training."""
        return self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation over seeds; the deviation of one value is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarise at least one value; those that are not there (NaN) have no deviation."""
        spreads = len(values) > 1 and all(map(math.isfinite, values))
        return cls(statistics.fmean(values), statistics.stdev(values) if spreads else None)

    def show(self, digits: int, sign: str = "") -> str:
        """As a table shows it."""
        spread = "" if self.deviation is None else f" ± {self.deviation:,.{digits}f}"
        return f"{self.mean:{sign},.{digits}f}{spread}"


FIGURES = (
    "bits_per_byte",
    "label_accuracy",
    "token_perplexity",
    "word_perplexity",
    "tokens_per_second",
    "peak_memory_bytes",
)


def by_label(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells that differ by their seed alone, in the order of their first."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.label, []).append(cell)
    return found


def summaries(cells: Sequence[Cell], reference: tuple[str, str] | None = None) -> list[dict[str, object]]:
    """One record per architecture and point, in the order of their first cells.

    Args:
        cells: that are done.
        reference: architecture and point that were named first; those of the first cell where it is None.

    ``bits_per_byte_difference`` and ``label_accuracy_difference`` compare seed by seed: equal seeds have equal data
    order, so that what a seed does to both is not counted as noise. Several architectures are compared with the first
    one at the same point, points of one architecture with the first point; ``compared_with`` is that label.
    """
    groups = by_label(cells)
    first = next(iter(groups.values()))
    architecture, point = reference or (cells[0].architecture, cells[0].point)
    is_one = {cell.architecture for cell in cells} == {architecture}
    records: list[dict[str, object]] = []
    for name, group in groups.items():
        at = point if is_one else group[0].point
        others = [cell for cell in cells if (cell.architecture, cell.point) == (architecture, at)]
        paired = {cell.seed: cell for cell in others if cell.label != name}
        figures = {figure: Summary.of([getattr(cell, figure) for cell in group]) for figure in FIGURES}
        pairs = [(cell, paired[cell.seed]) for cell in group if cell.seed in paired]
        differences = {
            f"{name}_difference": Summary.of([getattr(one, name) - getattr(other, name) for one, other in pairs])
            for name in ("bits_per_byte", "label_accuracy")
            if pairs
        }
        records.append(
            {
                "architecture": name,
                "compared_with": next((cell.label for cell in paired.values()), None),
                "seeds": [cell.seed for cell in group],
                "parameters": group[0].parameters,
                "parameters_difference": group[0].parameters / first[0].parameters - 1,
                "flops_per_token": group[0].flops_per_token,
                "flops": group[0].flops,
                "tokens": group[0].tokens,
                "trained_positions": group[0].trained_positions,
                **figures,
                **differences,
            }
        )
    return records


def table(records: Sequence[dict[str, object]], short: bool = False) -> str:
    """The table of ``summaries`` in Markdown; what follows ± is the standard deviation over seeds.

    ``short`` leaves out what does not fit into 100 columns.
    """
    first: dict[str, Any] = records[0]
    classified = math.isfinite(first["label_accuracy"].mean)
    figure = "label_accuracy" if classified else "bits_per_byte"
    compared = {str(record["compared_with"]) for record in records if record["compared_with"]}
    reference = next(iter(compared), "the first")
    if len(compared) > 1:
        reference = f"{reference.split()[0]} there"
    elif len(reference) > 15:
        reference = "the first"
    most = max(len(record["seeds"]) for record in records)  # type: ignore[arg-type]
    of_text: dict[str, Callable[[dict[str, Any]], str]] = {
        "token ppl": lambda record: record["token_perplexity"].show(2),
        "word ppl": lambda record: record["word_perplexity"].show(1),
    }
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "architecture": lambda record: (
            record["architecture"] + (f" (seeds: {len(record['seeds'])})" if len(record["seeds"]) < most else "")
        ),
        figure.replace("_", " "): lambda record: record[figure].show(4),
        f"minus {reference}, paired": lambda record: _difference(record, figure),
        **({} if classified else of_text),
        "parameters": lambda record: f"{record['parameters']:,} ({record['parameters_difference']:+.2%})",
        "MFLOPs per token": lambda record: f"{record['flops_per_token'] / 1e6:,.2f}",
        "tokens": lambda record: f"{record['tokens']:,}",
        "TFLOPs": lambda record: f"{record['flops'] / 1e12:,.3g}",
        "tokens per second": lambda record: record["tokens_per_second"].show(0),
        "peak memory (MiB)": lambda record: _scaled(record["peak_memory_bytes"], 2**-20).show(0),
    }
    kept = list(columns)
    if short:
        kept = [*kept[:3], "tokens", "TFLOPs"]
    return markdown(kept, [[columns[name](record) for name in kept] for record in records])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is to the left; its cells are padded, so that it reads in a terminal, too."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if number else "-") for number, width in enumerate(widths))
    return "\n".join([line(columns), f"|{rule}|", *map(line, rows)]) + "\n"


def accuracy_table(cells: Sequence[Cell]) -> str:
    """Accuracy of each architecture by distance, in Markdown."""
    distances = [int(distance) for distance, _ in cells[0].accuracy]
    rows = []
    for name, group in by_label(cells).items():
        shares = zip(*([share for _, share in cell.accuracy] for cell in group), strict=True)
        rows.append([name, str(group[0].receptive_field), *(Summary.of(values).show(3) for values in shares)])
    return markdown(["architecture", "field", *map(str, distances)], rows)


def _difference(record: dict[str, Any], figure: str) -> str:
    found: Summary | None = record.get(f"{figure}_difference")
    return "" if found is None else found.show(4, "+")


def _scaled(summary: Summary, factor: float) -> Summary:
    return Summary(summary.mean * factor, None if summary.deviation is None else summary.deviation * factor)


def plot_accuracy(cells: Sequence[Cell], chance: float, file: Path) -> None:
    """Draw accuracy against distance: the mean over the seeds and their range; receptive fields as vertical lines."""
    figure, axes = pyplot().subplots(figsize=(9, 5), layout="constrained")
    for number, (name, group) in enumerate(by_label(cells).items()):
        distances = [distance for distance, _ in group[0].accuracy]
        shares = list(zip(*([share for _, share in cell.accuracy] for cell in group), strict=True))
        color = f"C{number}"
        axes.plot(distances, [statistics.fmean(values) for values in shares], "o-", color=color, label=name)
        if len(group) > 1:
            axes.fill_between(distances, list(map(min, shares)), list(map(max, shares)), color=color, alpha=0.15)
        if group[0].receptive_field <= 1.5 * max(distances):
            axes.axvline(group[0].receptive_field, color=color, linestyle=":")
    axes.axhline(chance, color="grey", linewidth=0.8)
    axes.text(0.01, chance, "chance", transform=axes.get_yaxis_transform(), va="bottom", color="grey")
    axes.set(
        xlabel="distance (tokens); dotted: receptive field", ylabel="accuracy (share of symbols)", ylim=(-0.02, 1.04)
    )
    axes.set_title(f"{cells[0].protocol}, by distance of what answers")
    axes.set_xscale("log", base=2)
    axes.legend()
    save_picture(figure, file)


def pyplot() -> Any:
    """matplotlib without a screen, imported where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def save_picture(figure: Any, file: Path) -> None:
    """Write a picture that is the same when it is drawn again."""
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot().close(figure)


def plot(cells: Sequence[Cell], file: Path) -> None:
    """Draw loss against tokens and against FLOPs: the mean over the seeds, and each seed as a thin line."""
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    ends: list[tuple[float, str, str]] = []
    for number, (name, group) in enumerate(by_label(cells).items()):
        if not all(cell.curve for cell in group):
            continue
        tokens = [point[0] for point in group[0].curve]
        seeds = [[point[1] for point in cell.curve] for cell in group]
        mean = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
        is_latent = group[0].trained_positions < max(cell.trained_positions for cell in cells)
        style: dict[str, Any] = {"color": f"C{number}", "linestyle": "--" if is_latent else "-"}
        style |= {"marker": "o", "markersize": 3} if len(tokens) < 4 else {}
        for panel, scale in zip(axes, (1e-6, group[0].flops_per_token), strict=True):
            x = [count * scale for count in tokens]
            panel.plot(x, mean, **style)
            for losses in seeds if len(seeds) > 1 else ():
                panel.plot(x, losses, linewidth=0.5, alpha=0.5, **style)
        ends.append((mean[-1], name + (" (latents only)" if is_latent else ""), f"C{number}"))
    axes[0].set(xlabel="tokens (millions)", ylabel=CURVE_LABEL, title="at equal data")
    axes[1].set(xlabel="FLOPs", title="at equal compute")
    write_labels(axes[0], ends)
    save_picture(figure, file)


def write_labels(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the name of each line at its right end; names that would overlap are moved apart.

    Args:
        axes: the panel.
        ends: last value, name and colour of each line.
    """
    low, high = axes.get_ylim()
    step = (high - low) * 0.045
    place = low - step
    for value, name, color in sorted(ends):
        place = max(value, place + step)
        axes.annotate(
            name,
            (1.0, value),
            (1.02, place),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5},
            annotation_clip=False,
        )
