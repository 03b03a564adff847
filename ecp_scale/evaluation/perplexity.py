"""How well a model predicts a text: negative log-likelihood under a named protocol, in three units.

- ``stream``: one pass over the whole text in chunks, every token scored once, with all the context
  that the model can reach (exact: the caches hand the last segment on). Only distances may matter to the model.
- ``sliding``: windows of n tokens moved by n/2 (by the latents, where these are fewer), only the new tokens of each
  scored (of the first: all), so every token counts once, with at least n/2 tokens of context. Latent models score no
  more than their latents in a window; their first windows begin with ends of documents in place of text.
- ``release``: as the authors' release measures, for comparison with its figures alone: windows of n + 1 tokens moved by
  n/2, the ragged tail dropped, every trained position scored, the mean over windows.
"""

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from ecp_scale.config import ModelConfig
from ecp_scale.errors import InputError
from ecp_scale.evaluation.comparison import Protocol
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.positions import Stream

Ids = npt.NDArray[np.integer]
STREAM_CHUNK_TOKENS = 4096
ROUND = 16
"""Windows or chunks that every replica scores before all add up what they have."""
COUNTED = 1 << 22
"""Ids that are counted at a time."""
COMPARABLE_UNKNOWN_SHARE = 0.001
"""Share of unknown tokens above which figures per word and byte flatter: what they stand for costs nothing."""


class SliceableIds(typing.Protocol):
    """Ids of a text in an array, or in a file that is read where they are asked for."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, part: slice, /) -> Ids:
        """Some of them."""


@dataclass(frozen=True)
class Text:
    """A text to score: ``ids`` (T,) of its documents, each with its end, and the size of the text they came from.

    ``lines`` counts line ends, ``unknown`` the ids that stand for what the vocabulary cannot write.
    """

    ids: SliceableIds
    bytes: int
    words: int
    lines: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of one evaluation. NLL in nats; the ends of documents are scored and counted as tokens."""

    protocol: str
    nll: float
    tokens_scored: int
    tokens: int
    bytes: int
    words: int
    lines: int = 0
    unknown: int = 0

    @classmethod
    def of(cls, protocol: str, nll: float, tokens_scored: int, text: Text) -> "EvaluationResult":
        """The figures of a text."""
        return cls(protocol, nll, tokens_scored, len(text.ids), text.bytes, text.words, text.lines, text.unknown)

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood of a scored token."""
        return self.nll / self.tokens_scored

    @property
    def token_perplexity(self) -> float:
        """exp of the mean NLL per token; depends on the tokenizer."""
        return _exp(self.nll_per_token)

    @property
    def word_perplexity(self) -> float:
        """exp(total NLL / words), words split at white space. Comparable between tokenizers."""
        return _exp(self.nll_per_token * self.tokens / self.words)

    @property
    def word_and_line_end_perplexity(self) -> float:
        """exp(total NLL / (words + line ends)), the unit of the literature for WikiText."""
        return _exp(self.nll_per_token * self.tokens / (self.words + self.lines))

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that stand for what the vocabulary cannot write."""
        return self.unknown / self.tokens

    @property
    def is_comparable(self) -> bool:
        """Whether figures per word and byte compare with those of other tokenizers."""
        return self.unknown_share <= COMPARABLE_UNKNOWN_SHARE

    @property
    def bits_per_byte(self) -> float:
        """Total NLL / (ln 2 * bytes of UTF-8). Comparable between tokenizers."""
        return self.nll_per_token * self.tokens / (math.log(2) * self.bytes)

    @property
    def tokens_per_word(self) -> float:
        """Tokens, ends of documents included, per word."""
        return self.tokens / self.words


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


class Prefixed:
    """Ids behind some others that are all the same; only what is asked for becomes int64, and is read."""

    def __init__(self, ids: SliceableIds, leader: int, count: int) -> None:
        self.ids, self.leader, self.count = ids, leader, count

    def __len__(self) -> int:
        return self.count + len(self.ids)

    def __getitem__(self, part: slice) -> Ids:
        start, stop, _ = part.indices(len(self))
        leaders = np.full(max(0, min(stop, self.count) - start), self.leader, dtype=np.int64)
        return np.concatenate(
            (leaders, self.ids[max(0, start - self.count) : max(0, stop - self.count)]), dtype=np.int64
        )


def default_protocol(config: ModelConfig) -> Protocol:
    """``stream`` where memory is bounded and every position looks like every other; else ``sliding``."""
    return "stream" if has_relative_positions(config) and config.geometry.bounded_cache else "sliding"


def has_relative_positions(config: ModelConfig) -> bool:
    """Whether only distances between positions matter."""
    rotates_values = config.tied_key_value and config.rotary != "none"
    return config.rotary != "first_layer" and not rotates_values and not config.has_first_projection


class Part(NamedTuple):
    """Which part of a text a replica of the model scores."""

    rank: int = 0
    size: int = 1


def evaluate(
    model: LanguageModel,
    text: Text,
    end_of_document: int,
    protocol: Protocol,
    progress: bool = False,
    replicas: ProcessGroup | None = None,
) -> EvaluationResult:
    """Score a text.

    An end of document is put before the first token, so that the first one is predicted too.

    Args:
        model: in evaluation mode.
        text: the same on all ranks.
        end_of_document: id that ends a document.
        protocol: how the text is cut.
        progress: show it on a terminal.
        replicas: ranks with a model each, or a share of one, that score a part of the text each; every rank gets the
            figures of all of it.

    Raises:
        InputError: if the text is too short for the protocol, or the architecture cannot follow it.
    """
    model.config.check_predicts_tokens("a text has no loss under")
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol is {protocol!r}, expected one of {', '.join(get_args(Protocol))}")
    ids = Prefixed(text.ids, end_of_document, 1)
    n, geometry = model.config.sequence_length, model.config.geometry
    part = Part() if replicas is None else Part(replicas.rank(), replicas.size())
    if text.words == 0:
        raise InputError("the text to evaluate has no words")
    if protocol == "release" and len(ids) < n + 1:
        raise InputError(f"protocol release needs a window of {n} + 1 tokens, the text has {len(ids)}")
    if protocol == "stream" and not geometry.streams:
        raise InputError(f"protocol stream: the context of {model.config.architecture} is not causal; use sliding")
    # Where positions are counted from the beginning of a document, a replica would have to know where that is.
    absolute = model.attention.restart_positions and not has_relative_positions(model.config)
    if protocol == "stream" and part.size > 1 and (absolute or not geometry.bounded_cache):
        raise InputError(
            f"protocol stream: what this {model.config.architecture} says depends on all that came before, so "
            f"{part.size} replicas cannot share a text; use sliding, or parallel.tensor for all ranks"
        )
    scores = {"stream": stream_losses, "sliding": _sliding, "release": _release}[protocol](model, ids, part)
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    is_done = False
    with tqdm(total=len(text.ids) // part.size, unit="token", disable=None if progress else True, desc=protocol) as bar:
        while not is_done:
            # In rounds, so that a replica that is slower than others is not waited for longer than a message may take.
            found = torch.zeros(3, dtype=torch.float64)
            for losses in islice(scores, ROUND):
                found += torch.tensor([losses.double().sum().item(), losses.numel(), 1.0], dtype=torch.float64)
                bar.update(losses.numel())
            if replicas is not None and part.size > 1:
                shared = found.to(device)
                dist.all_reduce(shared, group=replicas)
                found = shared.cpu()
            sums += found
            is_done = found[2].item() == 0
    return EvaluationResult.of(protocol, sums[0].item(), int(sums[1]), text)


def stream_losses(model: LanguageModel, ids: Prefixed, part: Part) -> Iterator[Tensor]:
    """Exact: a replica begins as many tokens before its own as they depend on, where segments and groups begin."""
    geometry, targets = model.config.geometry, len(ids) - 1
    # A window is whole segments; groups need not end where it does.
    border = math.lcm(geometry.sequence_length, geometry.group_length if "group_length" in geometry.fields else 1)
    first, last = (targets * number // part.size for number in (part.rank, part.rank + 1))
    begin = max(0, first - geometry.receptive_field_tokens) // border * border
    stream = model.new_stream()
    stream.position = begin
    for start in range(begin, last, STREAM_CHUNK_TOKENS):
        stop = min(start + STREAM_CHUNK_TOKENS, last)
        losses = _losses(model, ids[start : stop + 1], stream)
        if stop > first:
            yield losses[max(0, first - start) :]


def _sliding(model: LanguageModel, ids: Prefixed, part: Part) -> Iterator[Tensor]:
    n, scored_at_most = model.config.sequence_length, model.config.geometry.trained_positions
    first = min(len(ids) - 1, scored_at_most)
    # A latent model reads n tokens for any text, and scores the last ones; of a short text those that are text.
    padding = n - first if scored_at_most < n else 0
    ids = Prefixed(ids.ids, ids.leader, ids.count + padding)
    stride = min(n // 2, scored_at_most)

    def windows() -> Iterator[tuple[int, int]]:
        """The last target of each, and how many of them are scored."""
        yield min(n, len(ids) - 1), first
        for start in range(n, len(ids) - 1, stride):
            scored = min(stride, len(ids) - 1 - start)
            yield start + scored, scored

    for end, scored in islice(windows(), part.rank, None, part.size):
        yield _losses(model, ids[max(0, end - n) : end + 1])[-scored:]


def _release(model: LanguageModel, ids: Prefixed, part: Part) -> Iterator[Tensor]:
    n = model.config.sequence_length
    for start in range(0, len(ids) - n, n // 2)[part.rank :: part.size]:
        yield _losses(model, ids[start : start + n + 1])


@torch.no_grad()
def _losses(model: LanguageModel, ids: Ids, stream: Stream | None = None) -> Tensor:
    """NLL of every token of ``ids`` (T,) that follows a trained position."""
    tokens = torch.from_numpy(ids).to(next(model.parameters()).device)[None]
    # With targets, the scores of all positions never exist at once.
    losses: Tensor = model(tokens[:, :-1], tokens[:, 1:], stream=stream)[1][0]
    return losses


def unigram_result(text: Text, training_counts: Ids) -> EvaluationResult:
    """The yardstick: each token by its frequency in the training shards, add-one smoothed.

    Args:
        text: the text to score.
        training_counts: occurrences (V,) of every id in the training shards.
    """
    probabilities = (training_counts + 1) / (training_counts.sum() + len(training_counts))
    counts = np.zeros(len(probabilities), dtype=np.int64)
    for start in range(0, len(text.ids), COUNTED):
        counts += np.bincount(text.ids[start : start + COUNTED], minlength=len(probabilities))
    nll = float(-(counts * np.log(probabilities)).sum())
    return EvaluationResult.of("unigram", nll, len(text.ids), text)
