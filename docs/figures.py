"""Draw the figures of the documentation from the code that they describe: python docs/figures.py (extra `export`)."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ecp_scale.attention import KeyValue
from ecp_scale.config import ModelConfig
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.models.patterns import CompressingContext, LatentsAndContext
from ecp_scale.parallel.context import ParallelContext

SEGMENTS, LENGTH = 5, 4
OWN, LEFT, FIELD = "#3182bd", "#9ecae1", "#fdae6b"
SEEN, PLAIN_HEADS, SHIFTED_HEADS, CONTEXT = "#3182bd", "#bcbddc", "#756bb1", "#a1d99b"

PANELS = [
    ("ecp", 0, "ecp"),
    ("transformer", 0, "transformer"),
    ("sliding_window", 0, "sliding_window"),
    ("longlora", 0, "longlora"),
    ("split_attention", 0, "split_attention"),
    ("perceiver_ar", 0, "perceiver_ar, first layer"),
    ("perceiver_ar", 1, "perceiver_ar, others"),
    ("double_attention", 0, "double_attention"),
    ("compressed_double_attention", 0, "compressed_..., first layer"),
    ("compressed_double_attention", 1, "compressed_..., others"),
]
"""Architecture, layer and title of each drawing."""


def seen(config: ModelConfig, layer: int, parallel: ParallelContext) -> np.ndarray:
    """Who sees whom in a layer, by head: (heads, queries, keys), asked of the pattern itself.

    With equal scores and one-hot values, what comes out of a query is not 0 where it sees.
    """
    pattern = ARCHITECTURES[config.architecture](config, layer, parallel)
    keys, heads = config.geometry.key_rows(layer), config.heads
    values = torch.eye(keys).expand(1, heads, keys, keys)
    queries = torch.zeros(1, heads, pattern.query_rows(keys), keys)
    # The pattern before the compression.
    attend = LatentsAndContext.attend if isinstance(pattern, CompressingContext) else type(pattern).attend
    return attend(pattern, queries, KeyValue(torch.zeros_like(values), values), 0.0)[0].numpy() > 0


def ecp_pattern(parallel: ParallelContext, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """ECP with segments of LENGTH: who sees whom in a layer (1 the segment to the left, 2 the own one), and what the
    last token depends on, layer by layer.
    """
    n = SEGMENTS * LENGTH
    config = ModelConfig(heads=2, width=8, sequence_length=n, segment_length=LENGTH)
    sees = seen(config, 0, parallel)[0]
    segment = np.arange(n) // LENGTH
    rows = [np.arange(n) == n - 1]
    for _ in range(layers):
        rows.append(sees[rows[-1]].any(axis=0))
    return sees * (1 + (segment[:, None] == segment[None, :])), np.array(rows)


def draw_ecp(parallel: ParallelContext, file: Path) -> None:
    """The README's figure."""
    pattern, field = ecp_pattern(parallel, layers=3)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.0), layout="constrained")
    left.imshow(pattern, cmap=ListedColormap(["white", LEFT, OWN]), vmin=0, vmax=2)
    right.imshow(field, cmap=ListedColormap(["white", FIELD]), aspect=2.6, origin="lower")
    for axes in (left, right):
        for border in range(SEGMENTS + 1):
            axes.axvline(border * LENGTH - 0.5, color="grey", linewidth=0.8)
        axes.set_xticks([s * LENGTH + (LENGTH - 1) / 2 for s in range(SEGMENTS)], range(SEGMENTS))
    for border in range(SEGMENTS + 1):
        left.axhline(border * LENGTH - 0.5, color="grey", linewidth=0.8)
    left.set_yticks([])
    left.set(title="one layer", xlabel="keys (by segment)", ylabel="queries")
    right.set_yticks(range(4), ["output", "layer 3 input", "layer 2 input", "layer 1 input"])
    right.set(title="receptive field of the last token", xlabel="positions (by segment)")
    first = (SEGMENTS - 4) * LENGTH - 0.5
    right.annotate(
        "", (first, 3.62), (SEGMENTS * LENGTH - 0.5, 3.62), arrowprops={"arrowstyle": "<->"}, annotation_clip=False
    )
    right.text((first + SEGMENTS * LENGTH - 0.5) / 2, 3.72, "(L + 1) * m tokens, L = 3", ha="center", fontsize=9)
    right.set_ylim(-0.5, 4.2)
    add_key(figure, {OWN: "own segment, causal", LEFT: "segment to the left", FIELD: "what the last token depends on"})
    figure.savefig(file, metadata={"Date": None})


def add_key(figure: Figure, meanings: dict[str, str]) -> None:
    """What the colours mean, below all panels."""
    patches = [Patch(color=colour, label=meaning) for colour, meaning in meanings.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)


def draw_architectures(parallel: ParallelContext, file: Path) -> None:
    """Every architecture: n 24, m 4, l 12, c 6, w 6, g 8."""
    figure, panels = pyplot.subplots(2, 5, figsize=(13, 6.0), layout="constrained")
    for axes, (architecture, layer, title) in zip(panels.flat, PANELS, strict=True):
        config = ModelConfig(
            architecture=architecture,  # type: ignore[arg-type]
            layers=3,
            width=8,
            heads=2,
            sequence_length=24,
            segment_length=4,
            latents=12,
            compressed_context=6,
            window=6,
            group_length=8,
        )
        sees = seen(config, layer, parallel)
        draw_panel(axes, sees, sees.shape[2] - 12 if not config.geometry.streams else 0)
        axes.set_title(title, fontsize=10)
    meanings = {
        SEEN: "seen by all heads",
        PLAIN_HEADS: "by the heads with plain groups alone",
        SHIFTED_HEADS: "by the heads with shifted groups alone",
        CONTEXT: "seen by queries of the context, which has no loss",
    }
    add_key(figure, meanings)
    figure.savefig(file, metadata={"Date": None})


def draw_panel(axes: Axes, sees: np.ndarray, context: int) -> None:
    """One pattern; queries of the context and heads of the second kind have colours of their own."""
    first, second = sees
    colours = np.where(first & second, 1, np.where(first, 2, np.where(second, 3, 0)))
    queries_of_context = max(0, context - (sees.shape[2] - sees.shape[1]))
    colours[:queries_of_context] = np.where(colours[:queries_of_context] > 0, 4, 0)
    axes.imshow(colours, cmap=ListedColormap(["white", SEEN, PLAIN_HEADS, SHIFTED_HEADS, CONTEXT]), vmin=0, vmax=4)
    for border in range(sees.shape[2] + 1):
        axes.axvline(border - 0.5, color="white", linewidth=0.5)
    for border in range(sees.shape[1] + 1):
        axes.axhline(border - 0.5, color="white", linewidth=0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{sees.shape[2]} keys", fontsize=8)
    axes.set_ylabel(f"{sees.shape[1]} queries", fontsize=8)


def main() -> None:
    """Write docs/attention_pattern.svg and docs/architectures.svg."""
    rcParams["svg.hashsalt"] = "ecp-scale"
    folder = Path(__file__).parent
    draw_ecp(ParallelContext.single(), folder / "attention_pattern.svg")
    draw_architectures(ParallelContext.single(), folder / "architectures.svg")


if __name__ == "__main__":
    main()
