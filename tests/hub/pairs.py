"""One model twice: ours, and the one of the files that travel with an export."""

import dataclasses

import torch
from torch import nn

from ecp_scale.checkpoint.hugging_face import config_fields
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.hub.configuration_ecp import EcpConfig
from ecp_scale.hub.modeling_ecp import EcpForCausalLM
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.groups import Groups
from tests.models.settings import build

DOCUMENTS = {
    "no documents": AttentionConfig(),
    "documents": AttentionConfig(document_mask=True, end_of_document=3),
    "restarted": AttentionConfig(document_mask=True, end_of_document=3, restart_positions=True),
}


def pair(
    config: ModelConfig, groups: Groups, attention: AttentionConfig | None = None
) -> tuple[LanguageModel, EcpForCausalLM]:
    """Both in float64 and in evaluation mode, with the same weights."""
    ours = build(config, groups, attention=attention)
    fields = config_fields(config, attention or AttentionConfig(), "float64")
    theirs = EcpForCausalLM(
        EcpConfig(**{name: fields[name] for name in fields if name not in ("dtype", "torch_dtype")})
    )
    rows = config.known_vocab_size
    weights = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    padded = ("embedding.weight", "output.weight", "output.bias")
    theirs.double().load_state_dict({name: w[:rows] if name in padded else w for name, w in weights.items()})
    return ours, theirs.eval()


def randomized(model: nn.Module, other: nn.Module) -> None:
    """Move every parameter of both models by the same random numbers, so that none is zero or one."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            dict(model.named_parameters())[name][: len(parameter)].copy_(parameter)


def with_dropout(config: ModelConfig) -> ModelConfig:
    """The same with dropout."""
    return dataclasses.replace(config, dropout=0.5)
