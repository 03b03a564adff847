"""Weights as a function of (seed, parameter name): equal for every layout of ranks and every padding."""

import hashlib
import math

import torch
from torch import Tensor, nn

from ecp_scale.config import ModelConfig
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import ColumnLinear, Embedding, RowLinear
from ecp_scale.parallel.partition import Partition, full_shape

RESIDUAL_BRANCH_ENDS = ("attention.output", "attention.first_output", "feed_forward.down")


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, parallel: ParallelContext, seed: int) -> None:
    """Fill every parameter in place, by ``config.initialization``; norms start as the identity.

    ``pytorch``: what nn.Linear and nn.Embedding do by default. ``normal``: normal with std 0.02, biases 0.
    ``depth_scaled``: the same with 0.02 / sqrt(2L) for the last matrix of each residual branch (GPT-2's rule).
    """
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                parameter.fill_(1.0 if name == "weight" else 0.0)
                continue
            full_name = f"{module_name}.{name}"
            digest = hashlib.sha256(f"{seed}/{full_name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            whole = torch.empty(full_shape(parameter, parallel.tp_size))
            if config.initialization == "pytorch":
                _pytorch_default(whole, module, generator)
            elif name == "bias":
                whole.zero_()
            else:
                ends_branch = module_name.endswith(RESIDUAL_BRANCH_ENDS)
                scaled = ends_branch and config.initialization == "depth_scaled"
                std = 0.02 / math.sqrt(2 * config.layers) if scaled else 0.02
                whole.normal_(0.0, std, generator=generator)
            share = Partition.of(parameter).split(
                whole, parallel.tp_size, parallel.tp_rank, parameter.shape[0] * parallel.tp_size
            )
            parameter.copy_(share)


def _pytorch_default(whole: Tensor, module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, Embedding):
        whole.normal_(generator=generator)
        return
    assert isinstance(module, ColumnLinear | RowLinear | nn.Linear)
    inputs = module.in_features if isinstance(module, nn.Linear) else module.input_size
    bound = 1 / math.sqrt(inputs)
    whole.uniform_(-bound, bound, generator=generator)
