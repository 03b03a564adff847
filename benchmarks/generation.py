"""Generation: time per token and bytes of cache after contexts of several lengths, against Hugging Face's generate.

Ours streams with two segments per layer, in our own program and through the files of an exported model with Hugging
Face's ``generate``; their Llama of the same size keeps every position. All take the likeliest token, one at a time.
"""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import hugging_face
from benchmarks.timing import alternate, medians, ratio
from ecp_scale.checkpoint.hugging_face import config_fields
from ecp_scale.config import Config
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.positions import Stream
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import process_groups
from ecp_scale.precision import weight_type


@torch.no_grad()
def compare(config: Config, contexts: tuple[int, ...], tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per token and cache bytes of both after each context; ``tokens`` are generated in each round.

    The contexts are whole segments, so that all streams stand at the same place of a segment.
    """
    with process_groups(config.parallel) as groups:
        dtype = weight_type(config)
        parallel = ParallelContext(groups.tensor, dtype)
        model = LanguageModel(config.model, parallel)
        initialize(model, config.model, parallel, seed=1)
        model.to(groups.device).eval()
        longer = dataclasses.replace(config.model, sequence_length=max(contexts) + tokens)
        theirs = hugging_face("llama", longer).to(groups.device, dtype).eval()
        exported = _exported(model)
        calls: dict[str, Callable[[], int]] = {}
        for context in contexts:
            calls[f"ours after {context}"] = partial(_ours, model, _streamed(model, context), tokens)
            calls[f"exported after {context}"] = partial(_theirs, exported, _read(exported, context), tokens)
            calls[f"full cache after {context}"] = partial(_theirs, theirs, _filled(theirs, context), tokens)
        cache_bytes = {name: call() for name, call in calls.items()}
        seconds = alternate(calls, rounds)
    first = f"ours after {contexts[0]}"
    return {
        name: {
            "milliseconds_per_token": middle / tokens * 1e3,
            "cache_bytes": cache_bytes[name],
            "times_the_time_of_ours_after_the_shortest_context": ratio(seconds, name, first),
        }
        for name, middle in medians(seconds).items()
    }


def _streamed(model: LanguageModel, context: int) -> Stream:
    """A stream that has read so many random tokens."""
    stream, device = model.new_stream(), next(model.parameters()).device
    ids = torch.randint(model.config.known_vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
    for chunk in ids.to(device).split(model.config.sequence_length, dim=1):
        model.logits(chunk, stream, last=1)
    return stream


def _ours(model: LanguageModel, stream: Stream, tokens: int) -> int:
    stream = copy.deepcopy(stream)
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    for _ in range(tokens):
        token = model.logits(token, stream, last=1).argmax(-1)
    held = [part for layer in stream.caches for cache in layer for part in (cache.left, cache.open) if part is not None]
    tensors = {id(tensor): tensor for part in held for tensor in (part.keys, part.values)}
    return sum(map(_bytes, tensors.values()))


def _exported(model: LanguageModel) -> Any:
    """The same model as the files of an export compute it."""
    from ecp_scale.hub.configuration_ecp import EcpConfig
    from ecp_scale.hub.modeling_ecp import EcpForCausalLM

    weights = dict(model.named_parameters())
    fields = config_fields(model.config, model.attention, str(model.parallel.dtype).removeprefix("torch."))
    result = EcpForCausalLM(EcpConfig(**fields)).to(model.norm.weight.device, model.parallel.dtype)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.copy_(weights[name][: len(parameter)])
    return result.eval()


@torch.no_grad()
def _read(model: Any, context: int) -> Any:
    """The cache of an exported model that has read so many random tokens."""
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
    cache = None
    for chunk in ids.to(model.device).split(model.config.sequence_length, dim=1):
        cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def _filled(model: Any, context: int) -> Any:
    """A full cache of so many positions."""
    from transformers import DynamicCache

    shape = (1, model.config.num_key_value_heads, context, model.config.head_dim)
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        keys, values = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def _theirs(model: Any, cache: Any, tokens: int) -> int:
    from transformers import DynamicCache

    goes_back = isinstance(cache, DynamicCache)  # ours does not, and is small enough to copy
    context, used = cache.get_seq_length(), cache if goes_back else copy.deepcopy(cache)
    ids = torch.zeros(1, context + 1, dtype=torch.int64, device=model.device)
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    model.generate(ids, past_key_values=used, do_sample=False, pad_token_id=0, **length)
    tensors = {id(tensor): tensor for layer in used.layers for tensor in (layer.keys, layer.values)}
    held = sum(map(_bytes, tensors.values()))
    if goes_back:
        cache.crop(context - cache.get_seq_length())
    return held


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
