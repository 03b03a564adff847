"""Token by token, with a cache of at most two segments per layer."""

from collections.abc import Iterator

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
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    caches = model.new_caches()
    chunk = model.config.sequence_length
    position = 0
    logits = torch.empty(0)
    for start in range(0, len(prompt), chunk):
        ids = torch.tensor([prompt[start : start + chunk]], device=device)
        logits = model.logits(ids, position, caches)[0, -1]
        position += ids.shape[1]
    for _ in range(max_new_tokens):
        token = _sample(logits.float().cpu(), temperature, top_k, generator)
        if token == end_of_document:
            return
        yield token
        logits = model.logits(torch.tensor([[token]], device=device), position, caches)[0, -1]
        position += 1


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
