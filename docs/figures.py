"""Draw the figures of the documentation: python docs/figures.py (needs the extra `export`)."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import ListedColormap

SEGMENTS, LENGTH = 5, 4
COLORS = ListedColormap(["white", "#9ecae1", "#3182bd"])


def pattern() -> np.ndarray:
    """Who sees whom in one layer: 0 nobody, 1 the segment to the left, 2 the own segment."""
    positions = np.arange(SEGMENTS * LENGTH)
    query, key = positions[:, None], positions[None, :]
    own = (query // LENGTH == key // LENGTH) & (key <= query)
    left = query // LENGTH == key // LENGTH + 1
    return own * 2 + left


def reach(layers: int) -> np.ndarray:
    """Layer by layer, how far back the last token depends on earlier ones: (layers + 1, positions)."""
    sees = pattern() > 0
    rows = [np.arange(SEGMENTS * LENGTH) == SEGMENTS * LENGTH - 1]
    for _ in range(layers):
        rows.append(sees[rows[-1]].any(axis=0))
    return np.array(rows)


def main() -> None:
    """Write docs/attention_pattern.svg."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.imshow(pattern(), cmap=COLORS, vmin=0, vmax=2)
    right.imshow(reach(3), cmap=ListedColormap(["white", "#fdae6b"]), aspect=2.6, origin="lower")
    for axes in (left, right):
        for border in range(SEGMENTS + 1):
            axes.axvline(border * LENGTH - 0.5, color="grey", linewidth=0.8)
        axes.set_xticks([s * LENGTH + (LENGTH - 1) / 2 for s in range(SEGMENTS)], range(SEGMENTS))
    for border in range(SEGMENTS + 1):
        left.axhline(border * LENGTH - 0.5, color="grey", linewidth=0.8)
    left.set_yticks([])
    left.set(title="one layer", xlabel="keys (by segment)", ylabel="queries")
    right.set_yticks(range(4), ["output", "layer 3 input", "layer 2 input", "layer 1 input"])
    right.set(title="what the last token depends on", xlabel="positions (by segment)")
    figure.savefig(Path(__file__).with_name("attention_pattern.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
