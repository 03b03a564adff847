"""Make a model whose parts a rank holds from the beginning: it is never whole anywhere.

The modules are made on the meta device, where tensors have shapes and no memory. Then every parameter gets the memory
of this rank's share, or, under ZeRO-3, of this rank's run of it, one parameter at a time.
"""

from typing import Any

import deepspeed
import torch
from torch import nn

from ecp_scale.config import Config
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.partition import Held
from ecp_scale.zero.json_config import zero_stage
from ecp_scale.zero.mpu import ModelParallelUnit


def make_model(
    config: Config, parallel: ParallelContext, deepspeed_config: dict[str, Any], device: torch.device
) -> LanguageModel:
    """A model whose weights hold anything.

    Args:
        config: the run, with its vocabulary known.
        parallel: this rank's groups and the type of the weights.
        deepspeed_config: the DeepSpeed JSON with every "auto" filled in.
        device: of this rank.
    """
    # Trap: on a CPU DeepSpeed compiles a shared-memory kernel at the first start, for a minute, with g++. Only its
    # inference all-reduce uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with torch.device("meta"):
        model = LanguageModel(config.model, parallel, config.attention)
    partitioned: list[nn.Parameter] = []
    for module in reversed(list(model.modules())):  # children first: ZeRO-3 takes them with their parents
        made = _allocate(module, device)
        if not made or zero_stage(deepspeed_config) < 3:
            continue
        if partitioned:
            partitioned[0].convert_to_zero_parameters(param_list=made)  # type: ignore[attr-defined]
        else:
            # Trap: its DeepSpeedConfig counts a single rank until this has found the groups that are there.
            deepspeed.init_distributed(auto_mpi_discovery=False)
            unit = ModelParallelUnit()
            group = unit.get_data_parallel_group()
            deepspeed.zero.Init(module, group, dtype=parallel.dtype, config_dict_or_path=deepspeed_config, mpu=unit)
            partitioned = made
    return model


def _allocate(module: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Give the parameters of a module itself memory; what they say of themselves stays."""
    found = []
    for name, parameter in list(module.named_parameters(recurse=False)):
        made = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        made.__dict__.update(parameter.__dict__)
        module.register_parameter(name, made)
        found.append(made)
    return found


def held_weight(parameter: nn.Parameter) -> Held:
    """What this rank holds of a parameter's weight: its share, or under ZeRO-3 a run of that."""
    run = getattr(parameter, "ds_tensor", None)
    if run is None:
        return Held(parameter.detach(), parameter.shape, 0)
    rank = parameter.ds_process_group.rank()  # type: ignore[attr-defined]
    return Held(run, parameter.ds_shape, rank * run.numel())  # type: ignore[attr-defined]
