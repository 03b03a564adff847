"""Token by token: with caches (two segments per layer for ecp), or by re-reading the last window (latent models)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ecp_scale.errors import InputError
from ecp_scale.models.language_model import LanguageModel

LEAST_TEMPERATURE = 0.001


def generate(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1,
    end_of_document: int | None = None,
) -> Iterator[int]:
    """Sample a continuation.

    Args:
        model: in evaluation mode.
        prompt: at least one id; any length, it passes through the caches in chunks.
        max_new_tokens: where to stop.
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest only.
        seed: of the sampling.
        end_of_document: id after which to stop; it is not returned.

    Returns:
        New ids, one at a time.

    Raises:
        InputError: naming a number that cannot be sampled with.
    """
    check_sampling(max_new_tokens, temperature, top_k, seed)
    return _generate(model, prompt, max_new_tokens, temperature, top_k, seed, end_of_document)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    """Refuse numbers that ``generate`` cannot sample with.

    Raises:
        InputError: naming the number.
    """
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature <= 1 / LEAST_TEMPERATURE:
        raise InputError(
            f"temperature is {temperature}, expected 0 (the likeliest token) or a number from {LEAST_TEMPERATURE} to "
            f"{1 / LEAST_TEMPERATURE:.0f}"
        )
    if max_new_tokens < 1 or (top_k is not None and top_k < 1):
        raise InputError(f"max_new_tokens is {max_new_tokens} and top_k {top_k}, expected at least 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}, expected a number from 0 to 2^63 - 1")


@torch.no_grad()
def _generate(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    end_of_document: int | None,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    follow = _streamed(model) if model.config.geometry.streams else _windowed(model, end_of_document or 0)
    logits = follow(prompt)
    for _ in range(max_new_tokens):
        token = _sample(logits.float().cpu(), temperature, top_k, generator)
        if token == end_of_document:
            return
        yield token
        logits = follow([token])


def _streamed(model: LanguageModel) -> Callable[[list[int]], Tensor]:
    """Feeds further ids through the caches, and returns the logits (V,) after them."""
    stream = model.new_stream()
    device = next(model.parameters()).device

    def follow(ids: list[int]) -> Tensor:
        chunks = [ids[i : i + model.config.sequence_length] for i in range(0, len(ids), model.config.sequence_length)]
        return [model.logits(torch.tensor([chunk], device=device), stream, last=1)[0, -1] for chunk in chunks][-1]

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


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
