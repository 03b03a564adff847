"""Models on a GPU beside the same weights on the CPU: losses, gradients, streams, waits and graphs."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.device import to_device
from tests.models.settings import BOTH, CAUSAL, NAMES, SCALED, random_tokens, variant

SIZES = {"width": 128, "sequence_length": 512, "segment_length": 128, "vocab_size": 300, "feed_forward_width": 256}
SIZES |= {"window": 200, "group_length": 128, "compressed_context": 100}
END = 7
ATTENTION = {
    "whole": AttentionConfig(),
    "documents": AttentionConfig(document_mask=True, restart_positions=True, end_of_document=END),
}
GPU = torch.device("cuda", 0)


def sized(config: ModelConfig, architecture: str) -> ModelConfig:
    """Settings at sizes that the kernels for GPUs are for."""
    latents = {"latents": 256} if variant(config, architecture).latents else {}
    return variant(config, architecture, **SIZES, **latents)


def built(config: ModelConfig, dtype: torch.dtype, attention: AttentionConfig, **changes: object) -> LanguageModel:
    """A model in training on the CPU, of random weights that are the same for every type but for rounding."""
    parallel = dataclasses.replace(ParallelContext.single(dtype), **changes)
    model = LanguageModel(config, parallel, attention)
    initialize(model, config, parallel, seed=1)
    return model.train()


def micro_batch(model: LanguageModel, batch: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Loss and gradients of sequences that lie on the host."""
    model.zero_grad()
    ids = to_device(batch, device)
    total, losses = model(ids[:, :-1], ids[:, 1:], on_host=batch[:, :-1])
    total.backward()
    gradients = {name: parameter.grad.double().cpu() for name, parameter in model.named_parameters()}
    return {"loss": losses.double().mean().cpu(), **gradients}


@pytest.mark.parametrize(
    ("dtype", "compiled", "recompute"),
    [
        (torch.float32, False, "none"),
        (torch.bfloat16, False, "none"),
        (torch.bfloat16, True, "none"),
        (torch.bfloat16, True, "selective"),
        (torch.bfloat16, True, "full"),
    ],
    ids=["fp32", "bf16", "bf16-compiled", "bf16-selective", "bf16-full"],
)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_cpu(
    architecture: str, attention: str, dtype: torch.dtype, compiled: bool, recompute: str
) -> None:
    config = sized(SCALED, architecture)
    batch = random_tokens(config, config.sequence_length + 1)
    rounded = built(config, dtype, ATTENTION[attention], compiled=compiled, recompute=recompute)
    exact = built(config, torch.float32, ATTENTION[attention])
    exact.load_state_dict({name: x.float() for name, x in rounded.state_dict().items()})
    wanted = micro_batch(exact, batch, torch.device("cpu"))
    found = micro_batch(rounded.to(GPU), batch, GPU)
    of_loss, of_gradients = (1e-5, 1e-4) if dtype == torch.float32 else (2e-3, 0.05)
    assert abs(found["loss"] / wanted["loss"] - 1) < of_loss
    errors = {name: (found[name] - x).norm() / x.norm() for name, x in wanted.items()}
    assert max(errors.values()) < of_gradients, errors


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("config", BOTH, ids=NAMES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_micro_batch_waits_for_nothing(config: ModelConfig, attention: str, dropout: float) -> None:
    config = dataclasses.replace(sized(config, "ecp"), dropout=dropout)
    model = built(config, torch.bfloat16, ATTENTION[attention], compiled=True).to(GPU)
    batch = random_tokens(config, config.sequence_length + 1)
    micro_batch(model, batch, GPU)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = to_device(batch, GPU)
        total, _ = model(ids[:, :-1], ids[:, 1:], on_host=batch[:, :-1])
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", CAUSAL)
@torch.no_grad()
def test_streams_score_what_whole_sequences_do(architecture: str, attention: str, dtype: torch.dtype) -> None:
    config = sized(SCALED, architecture)
    model = built(config, dtype, ATTENTION[attention]).to(GPU).eval()
    ids = random_tokens(config, config.sequence_length).to(GPU)
    whole = model.logits(ids)
    stream = model.new_stream()
    parts, start = [], 0
    for length in (1, 130, 1, 200, 1, 1, config.sequence_length):
        parts.append(model.logits(ids[:, start : start + length], stream))
        start += length
        if start >= config.sequence_length:
            break
    error = (torch.cat(parts, dim=1) - whole).double().norm() / whole.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)


def test_other_lengths_are_not_compiled_again() -> None:
    config = sized(SCALED, "ecp")
    model = built(config, torch.bfloat16, ATTENTION["documents"], compiled=True).to(GPU)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for length in (512, 384, 450, 300, 511, 257, 400):
        micro_batch(copy.deepcopy(model), random_tokens(config, length + 1), GPU)
        graphs.append(counters["unique_graphs"])
    assert graphs[-1] == graphs[1]
