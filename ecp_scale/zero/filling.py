"""Fill an engine with full tensors: a resume under another number of ranks, another ZeRO stage or precision.

They are cut anew, one parameter at a time, into what this rank's engine holds.
"""

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from ecp_scale.models.parameter_groups import weight_decay_groups
from ecp_scale.parallel.partition import Partition
from ecp_scale.zero.partitions import STEP, WEIGHT, ParameterStates

FLAT_PARTITIONS = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
"""Where ZeRO-3, bf16 under ZeRO-1 and ZeRO-1 and -2 keep this rank's fp32 weights, one flat tensor per group."""


def optimizer_order(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """Names of all parameters in the order in which the optimizer has them."""
    decayed, other = weight_decay_groups(engine.module)
    return [*decayed, *other]


@torch.no_grad()
def fill(engine: deepspeed.DeepSpeedEngine, states: Iterator[tuple[str, ParameterStates]]) -> None:
    """Fill a new engine, which has made no step yet.

    Args:
        engine: of any partition.
        states: name, full weight and full optimizer states of every parameter.
    """
    parallel = engine.module.parallel
    parameters = dict(engine.module.named_parameters())
    write = _writer(engine)
    begun = False
    for name, full in states:
        parameter = parameters[name]
        # ZeRO-3 leaves an empty tensor in the parameter's place.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        partition = Partition.of(parameter)
        padded_rows = shape[0] * parallel.tp_size
        part = {
            key: value if key == STEP else partition.split(value, parallel.tp_size, parallel.tp_rank, padded_rows)
            for key, value in full.items()
        }
        if not begun:
            _begin_states(engine, part)
            begun = True
        write(parameter, part)


def _begin_states(engine: deepspeed.DeepSpeedEngine, example: ParameterStates) -> None:
    """Give the optimizer of a ZeRO engine the states that its first step would; they are filled later."""
    optimizer = engine.optimizer
    flats: list[Tensor] = next((getattr(optimizer, name) for name in FLAT_PARTITIONS if hasattr(optimizer, name)), [])
    if not flats or example.keys() == {WEIGHT}:
        return
    for flat in flats:
        optimizer.optimizer.state[flat] = {
            key: value.clone() if key == STEP else torch.zeros_like(flat)
            for key, value in example.items()
            if key != WEIGHT
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _writer(engine: deepspeed.DeepSpeedEngine) -> Callable[[nn.Parameter, ParameterStates], None]:
    """How this engine's stage takes the share of one parameter."""
    stage = engine.zero_optimization_stage()
    return {0: _write_plain(engine.optimizer), 3: _write_partitioned}.get(stage, _write_flat)


def _write_plain(optimizer: Any) -> Callable[[nn.Parameter, ParameterStates], None]:
    def write(parameter: nn.Parameter, share: ParameterStates) -> None:
        parameter.copy_(share[WEIGHT])
        # Copies: a step that several parameters share would be counted up by each of them.
        states = {key: value.to(parameter.device, copy=True) for key, value in share.items() if key != WEIGHT}
        if states:
            optimizer.state[parameter] = states

    return write


def _write_flat(parameter: nn.Parameter, share: ParameterStates) -> None:
    parameter.copy_(share[WEIGHT])
    safe_set_full_fp32_param(parameter, share[WEIGHT])
    for key in share.keys() - {WEIGHT, STEP}:
        safe_set_full_optimizer_state(parameter, share[key], key)


def _write_partitioned(parameter: nn.Parameter, share: ParameterStates) -> None:
    stored: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    ranks, rank = group.size(), group.rank()

    def run(value: Tensor) -> Tensor:
        # The last runs are padded: DeepSpeed's own function for whole parameters reads beyond their end.
        padding = value.new_zeros(stored.numel() * ranks - value.numel())
        return torch.cat((value.flatten(), padding)).chunk(ranks)[rank]

    stored.copy_(run(share[WEIGHT]))
    safe_set_local_fp32_param(parameter, run(share[WEIGHT]))
    for key in share.keys() - {WEIGHT, STEP}:
        safe_set_local_optimizer_state(parameter, run(share[key]), key)
