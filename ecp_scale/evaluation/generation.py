"""Token by token: with caches (two segments per layer for ecp), or by re-reading the last window (latent models)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ecp_scale.errors import InputError
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.positions import Stream

LEAST_TEMPERATURE = 0.001
PROMPT_CHUNK_TOKENS = 4096
"""Tokens of a prompt that pass through the caches at a time."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What leaves tokens out is applied in the order of the fields."""

    repetition_penalty: float = 1.0
    """Scores of tokens that were there are divided by it, or multiplied where negative (arXiv 1909.05858)."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least so probable beside the likeliest (arXiv 2407.01082)."""
    seed: int = 1

    def check(self) -> None:
        """Refuse numbers that cannot be sampled with.

        Raises:
            InputError: naming the number.
        """
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature <= 1 / LEAST_TEMPERATURE:
            raise InputError(
                f"temperature is {self.temperature}, expected 0 (the likeliest token) or a number from "
                f"{LEAST_TEMPERATURE} to {1 / LEAST_TEMPERATURE:.0f}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, expected at least 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}, expected 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}, expected a number from 0.01 to 100")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, expected a number from 0 to 2^63 - 1")

    def choose(self, scores: Tensor, seen: Tensor, generator: torch.Generator) -> int:
        """The next token.

        Args:
            scores: of every token (V,), in float32.
            seen: which tokens were there (V,).
            generator: of the random numbers.
        """
        if self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self.temperature == 0:
            return int(scores.argmax())
        scores = scores / self.temperature
        if self.top_k is not None:
            smallest = scores.topk(min(self.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p < 1:
            ranked, order = probabilities.sort(descending=True)
            before = ranked.cumsum(-1) - ranked
            probabilities[order[before >= self.top_p]] = 0
        probabilities[probabilities < self.min_p * probabilities.max()] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    end_of_document: int | None = None,
) -> Iterator[int]:
    """Continue some ids.

    Args:
        model: in evaluation mode; the ranks that share it all call this, and get the same.
        prompt: at least one id; any length, it passes through the caches in chunks.
        max_new_tokens: where to stop.
        sampling: how tokens are chosen; None draws them as they are likely.
        end_of_document: id after which to stop; it is not returned.

    Returns:
        New ids, one at a time.

    Raises:
        InputError: naming a number that cannot be sampled with.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    model.config.check_predicts_tokens("nothing follows under")
    sampling = sampling or Sampling()
    sampling.check()
    return _generate(model, prompt, max_new_tokens, sampling, end_of_document)


@torch.no_grad()
def _generate(
    model: LanguageModel, prompt: list[int], max_new_tokens: int, sampling: Sampling, end_of_document: int | None
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    follow = _streamed(model) if model.config.geometry.streams else _windowed(model, end_of_document or 0)
    seen = torch.zeros(model.config.known_vocab_size, dtype=torch.bool)
    seen[prompt] = True
    scores = follow(prompt)
    for number in range(max_new_tokens):
        token = _of_first(model.parallel.tp_group, sampling.choose(scores.float().cpu(), seen, generator), device)
        if token == end_of_document:
            return
        yield token
        seen[token] = True
        if number + 1 < max_new_tokens:
            scores = follow([token])


def _of_first(group: ProcessGroup, token: int, device: torch.device) -> int:
    """What the first rank of a group has chosen: another processor may round so that another token wins."""
    if group.size() == 1:
        return token
    chosen = torch.tensor(token, device=device)
    dist.broadcast(chosen, group_src=0, group=group)
    return int(chosen)


def read(model: LanguageModel, ids: Tensor, stream: Stream) -> Tensor:
    """Pass ids (B, N), at least one, through the caches of a stream in chunks; the logits (B, V) after them."""
    chunks = ids.split(PROMPT_CHUNK_TOKENS, dim=1)
    return [model.logits(chunk, stream, last=1)[:, -1] for chunk in chunks][-1]


def _streamed(model: LanguageModel) -> Callable[[list[int]], Tensor]:
    """Feeds further ids through the caches, and returns the logits (V,) after them."""
    stream = model.new_stream()
    device = next(model.parameters()).device

    def follow(ids: list[int]) -> Tensor:
        return read(model, torch.tensor([ids], device=device), stream)[0]

    return follow


def _windowed(model: LanguageModel, padding: int) -> Callable[[list[int]], Tensor]:
    """Scores of the next token without a causal context: each call reads the last n ids, after ``padding``."""
    seen = [padding] * model.config.sequence_length
    device = next(model.parameters()).device

    def follow(ids: list[int]) -> Tensor:
        seen.extend(ids)
        del seen[: -model.config.sequence_length]
        return model.logits(torch.tensor([seen], device=device), last=1)[0, -1]

    return follow
