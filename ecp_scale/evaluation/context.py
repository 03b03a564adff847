"""What context is worth: the loss of each position of a window, and of the same tokens where less may be seen.

Neither needs another model: the weights are those of the evaluation, and the tokens too. So differences are paired,
and their errors come from how they vary over the text: blocks of it, which do not cross documents, are drawn again and
again (block bootstrap).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ecp_scale.config import ModelConfig
from ecp_scale.errors import InputError
from ecp_scale.evaluation.perplexity import (
    Ids,
    Part,
    Prefixed,
    Text,
    has_relative_positions,
    stream_losses,
)
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.positions import buckets

BLOCK_TOKENS = 1024
"""Tokens of a block of the bootstrap at most."""
BOOTSTRAPS = 1000
BATCH_TOKENS = 8192
Losses = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AtPositions:
    """Mean loss in nats of the tokens that are predicted from position ``first`` to ``last`` of a window, from 0 on.

    ``error`` is its standard error over windows; None of one window.
    """

    first: int
    last: int
    nll: float
    error: float | None


@dataclass(frozen=True)
class WithContext:
    """Mean loss in nats where a position sees at most ``context`` tokens, its own included; None where all that it can.

    ``difference`` is that to the uncut one, token by token, and ``error`` its standard error.
    """

    context: int | None
    nll: float
    difference: float
    error: float | None


class _Window(NamedTuple):
    """Inputs from ``start`` to before ``end``, of which the targets from ``first`` on are scored."""

    start: int
    first: int
    end: int


def by_position(model: LanguageModel, text: Text, end_of_document: int) -> list[AtPositions]:
    """Loss in buckets of positions, each twice as wide as the one before, over whole windows side by side.

    Args:
        model: in evaluation mode. Of a latent model the last l positions of a window are trained, and told.
        text: of at least one window.
        end_of_document: id that ends a document.

    Raises:
        InputError: if the text is shorter than a window.
    """
    model.config.check_predicts_tokens("there is no loss by position of")
    n, trained = model.config.sequence_length, model.config.geometry.trained_positions
    ids = Prefixed(text.ids, end_of_document, 1)
    windows = [_Window(start, start + n - trained, start + n) for start in range(0, len(ids) - n, n)]
    if not windows:
        raise InputError(f"the loss by position needs a window of {n} + 1 tokens, the text has {len(ids)}")
    rows = [np.stack(losses) for losses in _in_batches(model, ids, windows)]
    losses = np.concatenate(rows).astype(np.float64)
    found = []
    for first, last in buckets(n):
        part = losses[:, max(0, first - (n - trained)) : max(0, last + 1 - (n - trained))]
        if part.shape[1]:
            means = part.mean(1)
            error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
            found.append(AtPositions(max(first, n - trained), last, float(means.mean()), error))
    return found


def by_context(model: LanguageModel, text: Text, end_of_document: int, contexts: Sequence[int]) -> list[WithContext]:
    """Loss with the context cut short, for several lengths, and uncut, which comes last.

    A token is scored in a window of at most ``context`` tokens that ends a little behind it: with segments or groups
    where its own ends, so that they lie as in the uncut text; then windows are whole ones, of which a token sees all
    but a part of its own. It sees at least half of a window. From the receptive field on, nothing is cut that it
    depends on.

    Args:
        model: in evaluation mode.
        text: which is held in memory, as 12 bytes per token.
        end_of_document: id that ends a document.
        contexts: tokens that a position may see, its own included.

    Raises:
        InputError: if the architecture's context is not causal, or a context does not fit.
    """
    check_contexts(model.config, text, contexts)
    config = model.config
    relative = has_relative_positions(config) and config.geometry.bounded_cache
    ids = Prefixed(text.ids, end_of_document, 1)
    blocks = _blocks(ids, end_of_document)
    uncut = _uncut(model, ids) if relative else _cut(model, ids, config.sequence_length)
    found = []
    for context in sorted(contexts):
        difference = _cut(model, ids, context) - uncut
        error = bootstrap_error(difference, blocks)
        mean = float(difference.mean(dtype=np.float64))
        found.append(WithContext(context, mean + float(uncut.mean(dtype=np.float64)), mean, error))
    return [*found, WithContext(None, float(uncut.mean(dtype=np.float64)), 0.0, None)]


def check_contexts(config: ModelConfig, text: Text, contexts: Sequence[int]) -> None:
    """Refuse contexts that ``by_context`` cannot cut a text to.

    Raises:
        InputError: saying which.
    """
    config.check_predicts_tokens("no context can be cut of")
    if not config.geometry.streams:
        raise InputError(f"--context: the context of {config.architecture} is not causal, so it cannot be cut")
    relative = has_relative_positions(config) and config.geometry.bounded_cache
    most = len(text.ids) if relative else config.sequence_length
    largest = max(most, config.receptive_field_tokens) if relative else most
    wrong = [context for context in contexts if not 1 <= context <= largest]
    if wrong:
        limit = "tokens of the text" if relative else "tokens of a training window, which are the uncut context here"
        raise InputError(f"--context {', '.join(map(str, wrong))}: expected 1 to {most} ({limit})")


def _uncut(model: LanguageModel, ids: Prefixed) -> Losses:
    return np.concatenate([losses.float().cpu().numpy() for losses in stream_losses(model, ids, Part())])


def _cut(model: LanguageModel, ids: Prefixed, context: int) -> Losses:
    losses = np.empty(len(ids) - 1, dtype=np.float32)
    windows = list(_windows(model.config, len(ids) - 1, context))
    place = 0
    for some in _in_batches(model, ids, windows):
        for row in some:
            losses[place : place + len(row)] = row
            place += len(row)
    return losses


def _windows(config: ModelConfig, targets: int, context: int) -> Iterator[_Window]:
    """Windows whose scored parts lie side by side."""
    geometry = config.geometry
    border = {"ecp": config.segment_length, "longlora": geometry.group_length}.get(config.architecture, 1)
    # Windows much shorter than a segment begin anywhere: nothing of the uncut text is like them.
    border = border if context >= 2 * border else 1
    stride = border if border > 1 else max(1, context // 4)
    for first in range(0, targets, stride):
        end = min(first + stride, targets)
        # All of a stride see what its last one may: so many tokens, from a border on.
        start = max(0, -(-(first + stride - context) // border) * border)
        yield _Window(min(start, first), first, end)


def _in_batches(model: LanguageModel, ids: Prefixed, windows: Sequence[_Window]) -> Iterator[list[Losses]]:
    """Losses of the scored part of every window, in order; windows of one length are read together."""
    batch: list[_Window] = []
    for window in windows:
        length = window.end - window.start
        if batch and (length != batch[0].end - batch[0].start or (len(batch) + 1) * length > BATCH_TOKENS):
            yield _losses(model, ids, batch)
            batch = []
        batch.append(window)
    if batch:
        yield _losses(model, ids, batch)


@torch.no_grad()
def _losses(model: LanguageModel, ids: Prefixed, windows: Sequence[_Window]) -> list[Losses]:
    rows = np.stack([ids[window.start : window.end + 1] for window in windows])
    tokens = torch.from_numpy(rows).to(next(model.parameters()).device)
    losses = model(tokens[:, :-1], tokens[:, 1:])[1].float().cpu().numpy()
    return [row[window.first - window.end :] for row, window in zip(losses, windows, strict=True)]


def _blocks(ids: Prefixed, end_of_document: int) -> npt.NDArray[np.int32]:
    """Number of the block of every target (T,)."""
    targets: Ids = ids[1 : len(ids)]
    begins = np.concatenate(([True], targets[:-1] == end_of_document))
    starts = np.flatnonzero(begins)
    place = np.arange(len(targets)) - np.repeat(starts, np.diff([*starts, len(targets)]))
    numbers: npt.NDArray[np.int32] = np.cumsum(place % BLOCK_TOKENS == 0, dtype=np.int32) - 1
    return numbers


def bootstrap_error(values: Losses, blocks: npt.NDArray[np.int32]) -> float | None:
    """Standard error of a mean whose neighbours depend on each other: the spread over draws of whole blocks.

    Args:
        values: (T,).
        blocks: number of the block of each (T,), from 0 on.

    Returns:
        None where there is one block.
    """
    sums, counts = np.bincount(blocks, weights=values), np.bincount(blocks)
    if len(counts) < 2:
        return None
    rng = np.random.default_rng(0)
    means = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.integers(0, len(counts), len(counts))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    return float(np.std(means, ddof=1))


def draw(positions: Sequence[AtPositions], contexts: Sequence[WithContext], field: int, file: Path) -> None:
    """Draw the loss by position and by context, with two standard errors on both sides.

    Args:
        positions: of ``by_position``; empty leaves its panel out.
        contexts: of ``by_context``; likewise.
        field: the receptive field, in tokens.
        file: to write, by its ending.
    """
    from ecp_scale.evaluation.comparison import pyplot, save_picture

    panels = [bool(positions), bool(contexts)]
    figure, grid = pyplot().subplots(
        1, sum(panels), figsize=(6.5 * sum(panels), 4.5), layout="constrained", squeeze=False
    )
    axes: list[Any] = list(grid[0])
    if positions:
        panel = axes.pop(0)
        middle = [math.sqrt((one.first + 1) * (one.last + 1)) for one in positions]
        panel.errorbar(middle, [one.nll for one in positions], [2 * (one.error or 0) for one in positions], fmt="o-")
        panel.set_xscale("log", base=2)
        panel.set_xticks([one.first + 1 for one in positions], [str(one.first + 1) for one in positions])
        panel.set(xlabel="position in the window, from 1", ylabel="loss (nats per token)")
        panel.set_title("by position; bars: two standard errors")
    if contexts:
        panel = axes.pop(0)
        *cut, uncut = contexts
        seen = [one.context for one in cut]
        panel.errorbar(seen, [one.difference for one in cut], [2 * (one.error or 0) for one in cut], fmt="o-")
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.axvline(field, color="grey", linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(seen, list(map(str, seen)), rotation=45)
        panel.set(xlabel="tokens that a position may see; dotted: receptive field")
        panel.set(ylabel=f"nats per token above the uncut {uncut.nll:.3f}")
        panel.set_title("by context, the same tokens; bars: two standard errors")
    save_picture(figure, file)
