"""Resume under another layout: other numbers of ranks, another ZeRO stage or precision.

The whole tensors of a checkpoint are cut anew, one parameter at a time, into what this rank's engine holds.
"""

from collections.abc import Callable
from pathlib import Path
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

from ecp_scale.checkpoint.folder import CheckpointRecord
from ecp_scale.checkpoint.merging import STEP, WEIGHT, States, whole_states
from ecp_scale.models.decay import decayed_and_other
from ecp_scale.models.sharding import Layout

FLAT_PARTITIONS = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
"""Where ZeRO-3, bf16 under ZeRO-1 and ZeRO-1 and -2 keep this rank's fp32 weights, one flat tensor per group."""


@torch.no_grad()
def load_reshaped(engine: deepspeed.DeepSpeedEngine, folder: Path, record: CheckpointRecord) -> None:
    """Fill a new engine, which has made no step yet, with weights and optimizer states of a checkpoint of any layout.

    Raises:
        InputError: if the files disagree with each other or with the record.
    """
    shard = engine.module.shard
    decayed, other = decayed_and_other(engine.module)
    write = _writer(engine)
    begun = False
    for name, whole in whole_states(folder, record, [*decayed, *other]):
        parameter = (decayed if name in decayed else other)[name]
        shape = getattr(
            parameter, "ds_shape", parameter.shape
        )  # ZeRO-3 leaves an empty tensor in the parameter's place
        layout = Layout.of(parameter)
        share = {
            key: value if key == STEP else layout.split(value, shard.size, shard.rank, shape[0] * shard.size)
            for key, value in whole.items()
        }
        if not begun:
            _begin_states(engine, share)
            begun = True
        write(parameter, share)
    engine.global_steps, engine.skipped_steps = record.step, record.skipped_steps


def _begin_states(engine: deepspeed.DeepSpeedEngine, example: States) -> None:
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


def _writer(engine: deepspeed.DeepSpeedEngine) -> Callable[[nn.Parameter, States], None]:
    """How this engine's stage takes the share of one parameter."""
    stage = engine.zero_optimization_stage()
    return {0: _write_plain(engine.optimizer), 3: _write_partitioned}.get(stage, _write_flat)


def _write_plain(optimizer: Any) -> Callable[[nn.Parameter, States], None]:
    def write(parameter: nn.Parameter, share: States) -> None:
        parameter.copy_(share[WEIGHT])
        # Copies: a step that several parameters share would be counted up by each of them.
        states = {key: value.to(parameter.device, copy=True) for key, value in share.items() if key != WEIGHT}
        if states:
            optimizer.state[parameter] = states

    return write


def _write_flat(parameter: nn.Parameter, share: States) -> None:
    parameter.copy_(share[WEIGHT])
    safe_set_full_fp32_param(parameter, share[WEIGHT])
    for key in share.keys() - {WEIGHT, STEP}:
        safe_set_full_optimizer_state(parameter, share[key], key)


def _write_partitioned(parameter: nn.Parameter, share: States) -> None:
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
