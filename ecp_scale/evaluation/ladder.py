"""Loss against compute over a ladder of sizes: a power law for each architecture, with its uncertainty."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecp_scale.evaluation.comparison import Cell, markdown, pyplot, save_picture

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class PowerLaw:
    """loss = scale * (FLOPs / reference) ^ -exponent, fitted to logarithms; intervals of 95 % of both.

    ``reference`` is the geometric mean of the FLOPs, where the two estimates do not depend on each other.
    """

    reference: float
    scale: float
    scale_interval: tuple[float, float]
    exponent: float
    exponent_interval: tuple[float, float]

    def at(self, flops: float) -> float:
        """The loss that it gives."""
        return self.scale * (flops / self.reference) ** -self.exponent


def fit(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit a power law by least squares of logarithms.

    Args:
        flops: of at least three trainings.
        losses: of the same.
    """
    x, y = np.log(np.asarray(flops)), np.log(np.asarray(losses))
    reference = float(x.mean())
    centred = x - reference
    slope = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - slope * centred
    freedom = len(x) - 2
    variance = float((rest**2).sum()) / freedom
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 + 2.7 / freedom
    of_level, of_slope = (quantile * math.sqrt(variance / size) for size in (len(x), float((centred**2).sum())))
    level = float(y.mean())
    return PowerLaw(
        math.exp(reference),
        math.exp(level),
        (math.exp(level - of_level), math.exp(level + of_level)),
        -slope,
        (-slope - of_slope, -slope + of_slope),
    )


def ladders(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by architecture and by the point of a grid beside the size, those with at least three sizes."""
    found: dict[str, list[Cell]] = {}
    for cell in filter(lambda cell: math.isfinite(cell.bits_per_byte), cells):
        rest = re.sub(r"(^|-)\d+x\d+$", "", cell.point)
        found.setdefault(f"{cell.architecture} {rest}".rstrip(), []).append(cell)
    return {name: some for name, some in found.items() if len({cell.parameters for cell in some}) > 2}


def laws(cells: Sequence[Cell]) -> dict[str, PowerLaw]:
    """The power law of bits per byte for each ladder, of the mean over the seeds at each size."""
    found = {}
    for name, some in ladders(cells).items():
        sizes: dict[int, list[Cell]] = {}
        for cell in some:
            sizes.setdefault(cell.parameters, []).append(cell)
        means = [statistics.fmean(cell.bits_per_byte for cell in group) for group in sizes.values()]
        found[name] = fit([group[0].flops for group in sizes.values()], means)
    return found


def law_table(found: dict[str, PowerLaw]) -> str:
    """The fits in Markdown."""
    rows = [
        [
            name,
            f"{law.scale:.4f} ({law.scale_interval[0]:.4f} to {law.scale_interval[1]:.4f})",
            f"{law.exponent:.4f} ({law.exponent_interval[0]:.4f} to {law.exponent_interval[1]:.4f})",
            f"{law.reference:.3g}",
        ]
        for name, law in found.items()
    ]
    return markdown(("architecture", "bits per byte there", "exponent", "FLOPs"), rows)


def plot_ladder(cells: Sequence[Cell], file: Path) -> None:
    """Draw bits per byte against FLOPs, each cell as a point, and the fits."""
    figure, axes = pyplot().subplots(figsize=(9, 5), layout="constrained")
    found = laws(cells)
    for number, (name, some) in enumerate(ladders(cells).items()):
        axes.plot([cell.flops for cell in some], [cell.bits_per_byte for cell in some], "o", color=f"C{number}")
        ends = [min(cell.flops for cell in some), max(cell.flops for cell in some)]
        label = f"{name}: exponent {found[name].exponent:.3f}"
        axes.plot(ends, [found[name].at(end) for end in ends], "-", color=f"C{number}", label=label)
    axes.set(xlabel="FLOPs of the training", ylabel="bits per byte", xscale="log", yscale="log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:.3g}")
    axes.set_title(f"{len({cell.parameters for cell in cells})} sizes; seeds as single points")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_picture(figure, file)
