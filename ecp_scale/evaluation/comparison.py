"""Architectures side by side: the figures of each trained cell, and what they say over seeds."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Protocol = Literal["stream", "sliding", "release"]
CURVE_LABEL = "validation loss (nats per trained token)"


@dataclass(frozen=True)
class Cell:
    """One architecture trained with one seed.

    ``curve`` holds [tokens, validation loss] of the run; FLOPs are per token of a training window; speed is the median
    over the steps; memory is the peak of rank 0, on a CPU all resident memory of the process.
    """

    architecture: str
    seed: int
    protocol: str
    token_perplexity: float
    word_perplexity: float
    bits_per_byte: float
    parameters: int
    flops_per_token: float
    trained_positions: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    curve: list[list[float]]

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.architecture}-seed{self.seed}"


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation over seeds; the deviation of one value is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarise at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def show(self, digits: int, sign: str = "") -> str:
        """As a table shows it."""
        spread = "" if self.deviation is None else f" ± {self.deviation:,.{digits}f}"
        return f"{self.mean:{sign},.{digits}f}{spread}"


FIGURES = ("bits_per_byte", "token_perplexity", "word_perplexity", "tokens_per_second", "peak_memory_bytes")


def summaries(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """One record per architecture, in the order of their first cells.

    ``bits_per_byte_difference`` compares with the first architecture seed by seed: equal seeds have equal data order,
    so that what a seed does to both is not counted as noise.
    """
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.architecture, []).append(cell)
    first = next(iter(by_name.values()))
    reference = {cell.seed: cell for cell in first}
    records: list[dict[str, object]] = []
    for name, group in by_name.items():
        figures = {figure: Summary.of([getattr(cell, figure) for cell in group]) for figure in FIGURES}
        difference = [cell.bits_per_byte - reference[cell.seed].bits_per_byte for cell in group]
        records.append(
            {
                "architecture": name,
                "seeds": [cell.seed for cell in group],
                "parameters": group[0].parameters,
                "parameters_difference": group[0].parameters / first[0].parameters - 1,
                "flops_per_token": group[0].flops_per_token,
                "trained_positions": group[0].trained_positions,
                **figures,
                "bits_per_byte_difference": Summary.of(difference),
            }
        )
    return records


def markdown(records: Sequence[dict[str, object]]) -> str:
    """The table of ``summaries``; what follows ± is the standard deviation over seeds."""
    columns = (
        "architecture",
        "bits per byte",
        f"minus {records[0]['architecture']}, paired",
        "token ppl",
        "word ppl",
        "parameters",
        "MFLOPs per token",
        "tokens per second",
        "peak memory (MiB)",
    )
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(_row(record)) + " |" for record in records]
    return "\n".join(lines) + "\n"


def _row(record: dict[str, object]) -> Iterator[str]:
    def summary(name: str) -> Summary:
        value = record[name]
        assert isinstance(value, Summary)
        return value

    yield str(record["architecture"])
    yield summary("bits_per_byte").show(4)
    yield summary("bits_per_byte_difference").show(4, "+")
    yield summary("token_perplexity").show(2)
    yield summary("word_perplexity").show(1)
    yield f"{record['parameters']:,} ({record['parameters_difference']:+.2%})"
    yield f"{float(str(record['flops_per_token'])) / 1e6:,.2f}"
    yield summary("tokens_per_second").show(0)
    memory = summary("peak_memory_bytes")
    scaled = None if memory.deviation is None else memory.deviation / 2**20
    yield Summary(memory.mean / 2**20, scaled).show(0)


def plot(cells: Sequence[Cell], file: Path) -> None:
    """Draw loss against tokens and against FLOPs: the mean over the seeds, and each seed as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    names = list(dict.fromkeys(cell.architecture for cell in cells))
    ends: list[tuple[float, str, str]] = []
    for number, name in enumerate(names):
        group = [cell for cell in cells if cell.architecture == name]
        tokens = [point[0] for point in group[0].curve]
        seeds = [[point[1] for point in cell.curve] for cell in group]
        mean = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
        is_latent = group[0].trained_positions < max(cell.trained_positions for cell in cells)
        style = {"color": f"C{number}", "linestyle": "--" if is_latent else "-"}
        for panel, scale in zip(axes, (1e-6, group[0].flops_per_token), strict=True):
            x = [count * scale for count in tokens]
            panel.plot(x, mean, **style)
            for losses in seeds if len(seeds) > 1 else ():
                panel.plot(x, losses, linewidth=0.5, alpha=0.5, **style)
        ends.append((mean[-1], name + (" (latents only)" if is_latent else ""), f"C{number}"))
    axes[0].set(xlabel="tokens (millions)", ylabel=CURVE_LABEL, title="at equal data")
    axes[1].set(xlabel="FLOPs", title="at equal compute")
    write_labels(axes[0], ends)
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, dpi=120, metadata=metadata)
    pyplot.close(figure)


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
