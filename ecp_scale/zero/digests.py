"""Digests of the weights that an engine holds in fp32."""

from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from ecp_scale.parallel.digests import digest
from ecp_scale.parallel.partition import Partition
from ecp_scale.zero.filling import owned
from ecp_scale.zero.making import held_weight
from ecp_scale.zero.mpu import ModelParallelUnit


@torch.no_grad()
def held_digests(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """What this rank has of every parameter's digest; the sums over all ranks are the digests.

    Of what several ranks hold alike, the first one has all.
    """
    parallel, stage = engine.module.parallel, engine.zero_optimization_stage()
    if stage == 0 and ModelParallelUnit().get_data_parallel_rank() > 0:
        return {}
    found = {}
    for name, parameter in engine.module.named_parameters():
        partition = Partition.of(parameter)
        if partition.partition_dim is None and parallel.tp_rank > 0:
            continue
        held = held_weight(parameter)
        start, stop = owned(parameter, held.start, held.values.numel())
        if stop > start:
            share = partition.share(held.shape, parallel.tp_size, parallel.tp_rank)
            found[name] = digest(_in_fp32(parameter, stage).flatten(), share, start)
    return found


def _in_fp32(parameter: nn.Parameter, stage: int) -> Tensor:
    """What this rank holds of a parameter in fp32."""
    if stage == 0:
        return parameter
    if stage == 3:
        values: Tensor = safe_get_local_fp32_param(parameter)
        return values
    stored: Any = parameter
    fragment: Tensor = stored._hp_mapping.hp_fragment
    return fragment
