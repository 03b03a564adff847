"""Token by token: with caches (two segments per layer for ecp), or by re-reading the last window (latent models)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ecp_scale.models.language_model import LanguageModel


@torch.no_grad()
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

    Yields:
        New ids, one at a time.
    """
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
