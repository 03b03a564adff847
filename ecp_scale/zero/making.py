"""Make a model whose parts a rank holds from the beginning: it is never whole anywhere.

The modules are made on the meta device, where tensors have shapes and no memory. Then every parameter gets the memory
of this rank's share, or, under ZeRO-3, of this rank's run of it, one parameter at a time.
"""

import socket
from typing import Any

import deepspeed
import torch
from torch import nn

from ecp_scale.cluster.host_memory import free_memory
from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.models.initialization import whole_share
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.parameter_groups import optimizer_groups
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.partition import Held
from ecp_scale.precision import weight_type
from ecp_scale.zero.json_config import sent_bytes, zero_stage
from ecp_scale.zero.memory import ZeroConfig, is_on_host, states
from ecp_scale.zero.mpu import ModelParallelUnit

GIB = 1 << 30


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
    model = _without_memory(config, parallel)
    model.output.z_loss = config.training.z_loss
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


def _without_memory(config: Config, parallel: ParallelContext) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config.model, parallel, config.attention)


def check_host_memory(config: Config, deepspeed_config: dict[str, Any], groups: Groups, ranks_here: int) -> None:
    """Refuse a run whose states do not fit into this host's memory, where they are kept there.

    Args:
        config: the run, with its vocabulary known.
        deepspeed_config: the DeepSpeed JSON with every "auto" filled in.
        groups: this rank's process groups.
        ranks_here: of the launch, on this host.

    Raises:
        InputError: with what they need and what is free.
    """
    zero = ZeroConfig(**deepspeed_config.get("zero_optimization", {}))
    on_cpu = groups.device.type == "cpu"
    copied = config.checkpoint.asynchronous
    if not (on_cpu or copied or is_on_host(zero.offload_optimizer) or is_on_host(zero.offload_param)):
        return
    model = _without_memory(config, ParallelContext.of(config, groups, weight_type(config)))
    optimizer = config.optimizer
    groups_of_it = optimizer_groups(model, optimizer.name)
    held = states(
        [[value.numel() for value in group.parameters.values()] for group in groups_of_it],
        [optimizer.states(group.orthogonal) for group in groups_of_it],
        zero,
        bf16=config.training.precision == "bf16",
        sent_bytes=sent_bytes(deepspeed_config, config),
        data_ranks=groups.data.size(),
        largest_block=0,
    )
    states_here = held.on_device + held.on_host if on_cpu else held.on_host
    copies = held.weights + held.master_weights + held.moments if copied else 0
    needed, free = ranks_here * (states_here + copies), free_memory()
    if needed > free:
        ways = "more ranks, parallel.tensor, zero2 or zero3" + (" or no checkpoint.asynchronous" if copied else "")
        raise InputError(
            f"{socket.gethostname()} has {free / GIB:.1f} GiB of memory free, and the states of its {ranks_here} ranks "
            f"{'with their copies ' if copied else ''}need {needed / GIB:.1f} GiB, activations apart; use {ways}"
        )


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
        return whole_share(parameter)
    rank = parameter.ds_process_group.rank()  # type: ignore[attr-defined]
    return Held(run, parameter.ds_shape, rank * run.numel())  # type: ignore[attr-defined]
