"""How often a classifier names the right label, of what it takes which for which, and how sure the figure is."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecp_scale.data.batches import stack
from ecp_scale.data.corpus import Corpus
from ecp_scale.errors import InputError
from ecp_scale.models.language_model import LanguageModel

BATCH_TOKENS = 16384
NO_LABEL = "none"
"""Name of what a classifier says that is no label."""
Z = 1.959964
"""Standard deviations on both sides of an interval of 95 %."""


@dataclass(frozen=True)
class Classification:
    """What a classifier said of some windows: ``confusion`` counts them by true label (row) and by what was said.

    The last column of ``confusion`` is for what is no label at all. ``nll`` is the mean in nats.
    """

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    nll: float

    @property
    def windows(self) -> int:
        """How many there were."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """Share of right labels."""
        return sum(row[number] for number, row in enumerate(self.confusion)) / self.windows

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of 95 % of the accuracy (Wilson, 1927)."""
        count, share = self.windows, self.accuracy
        middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
        half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
        return middle - half, middle + half


def check_labels(corpus: Corpus) -> None:
    """Refuse shards without labels.

    Raises:
        InputError: naming them.
    """
    if not corpus.manifest.labels:
        raise InputError(
            f"shards {corpus.prefix}: no labels, but the model is a classifier; see ecp-preprocess --recipe"
        )


@torch.no_grad()
def classify(model: LanguageModel, corpus: Corpus) -> Classification:
    """Classify every window of a corpus with labels.

    Args:
        model: a classifier, in evaluation mode.
        corpus: whose windows are as long as the model's.
    """
    labels = corpus.manifest.labels
    device = next(model.parameters()).device
    counts = torch.zeros(len(labels), len(labels) + 1, dtype=torch.long)
    nll = 0.0
    size = max(1, BATCH_TOKENS // corpus.sequence_length)
    for first in range(0, corpus.windows, size):
        rows = stack(corpus, list(range(first, min(first + size, corpus.windows))))
        true = rows[:, -1]
        scores = model.logits(rows[:, :-1].to(device))[:, -1].float().log_softmax(-1).cpu()
        nll -= scores.gather(1, true[:, None]).double().sum().item()
        said = scores.argmax(-1).clamp(max=len(labels))
        counts += torch.bincount(true * (len(labels) + 1) + said, minlength=counts.numel()).view_as(counts)
    return Classification(labels, tuple(map(tuple, counts.tolist())), nll / corpus.windows)


def content(found: Classification) -> dict[str, Any]:
    """As a file of JSON has it."""
    low, high = found.interval
    return {
        "accuracy": found.accuracy,
        "accuracy_interval": [low, high],
        "nll": found.nll,
        "windows": found.windows,
        "labels": list(found.labels),
        "said": [*found.labels, NO_LABEL],
        "confusion": [list(row) for row in found.confusion],
    }


def draw(found: Classification, file: Path) -> None:
    """Draw the confusion matrix: of each true label, the share that was taken for each."""
    from ecp_scale.evaluation.comparison import pyplot, save_picture

    shares = [[count / max(1, sum(row)) for count in row] for row in found.confusion]
    figure, axes = pyplot().subplots(figsize=(7.5, 6.5), layout="constrained")
    columns = [*found.labels, NO_LABEL]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(found.labels)), found.labels)
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.2f}".lstrip("0"), ha="center", va="center", color=color, fontsize=8)
    low, high = found.interval
    axes.set(xlabel="said", ylabel="true")
    axes.set_title(f"accuracy {found.accuracy:.3f} ({low:.3f} to {high:.3f}) of {found.windows:,}")
    save_picture(figure, file)
