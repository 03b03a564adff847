"""Fill an engine from a checkpoint of any layout: another number of ranks, another ZeRO stage or precision.

Every rank reads the elements of each parameter that its engine holds in fp32, and no others. Under ZeRO-1 and ZeRO-2
the ranks then tell each other the weights as they do after a step.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import Tensor, nn

from ecp_scale.models.parameter_groups import weight_decay_groups
from ecp_scale.parallel.partition import Partition, Share
from ecp_scale.zero.making import held_weight
from ecp_scale.zero.saved_states import STEP, WEIGHT, ParameterStates

FLAT_PARTITIONS = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
"""Where ZeRO-3, bf16 under ZeRO-1 and ZeRO-1 and -2 keep this rank's fp32 weights, one flat tensor per group."""


def optimizer_order(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """Names of all parameters in the order in which the optimizer has them."""
    decayed, other = weight_decay_groups(engine.module)
    return [*decayed, *other]


class States(Protocol):
    """Where the states of parameters come from, see ``SavedStates``."""

    def keys(self, name: str) -> list[str]:
        """Which states of a parameter there are."""

    def read(self, name: str, share: Share, start: int, stop: int, keys: Sequence[str]) -> ParameterStates:
        """Some elements of a parameter, in fp32."""


@torch.no_grad()
def fill(engine: deepspeed.DeepSpeedEngine, saved: States) -> None:
    """Fill a new engine, which has made no step yet; before the next, ``share_weights``.

    Args:
        engine: of any partition.
        saved: the states of all its parameters.
    """
    parallel = engine.module.parallel
    write = {0: _write_plain, 3: _write_partitioned}.get(engine.zero_optimization_stage(), _write_flat)
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        keys = saved.keys(name)
        held = held_weight(parameter)
        share = Partition.of(parameter).share(held.shape, parallel.tp_size, parallel.tp_rank)
        if number == 0:
            step = saved.read(name, share, 0, 0, [STEP] if STEP in keys else [])
            begin_states(engine, [key for key in keys if key not in (WEIGHT, STEP)], step)
        start, stop = owned(parameter, held.start, held.values.numel())
        if stop > start:
            write(engine.optimizer, parameter, saved.read(name, share, start, stop, keys))


def share_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let the ranks of ZeRO-1 and ZeRO-2 tell each other the weights that they hold in fp32; all take part."""
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def owned(parameter: nn.Parameter, start: int, elements: int) -> tuple[int, int]:
    """Which elements of its share this rank holds in fp32, the first and the one after the last."""
    stored: Any = parameter
    if not hasattr(stored, "_hp_mapping"):
        return start, start + elements
    if stored._hp_mapping is None:  # ZeRO-1 and ZeRO-2, where a rank's partitions have none of it
        return 0, 0
    address = stored._hp_mapping.lp_fragment_address
    return address.start, address.start + address.numel


def begin_states(engine: deepspeed.DeepSpeedEngine, moments: list[str], step: ParameterStates) -> None:
    """Give the optimizer of a ZeRO engine the states that its first step would; they are filled later."""
    optimizer = engine.optimizer
    flats: list[Tensor] = next((getattr(optimizer, name) for name in FLAT_PARTITIONS if hasattr(optimizer, name)), [])
    if not flats or not moments:
        return
    for flat in flats:
        # On its device, where torch's fused AdamW wants them.
        states = {key: value.to(flat.device, copy=True) for key, value in step.items()}
        optimizer.optimizer.state[flat] = {**states, **{key: torch.zeros_like(flat) for key in moments}}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _write_plain(optimizer: Any, parameter: nn.Parameter, mine: ParameterStates) -> None:
    parameter.copy_(mine[WEIGHT].view(parameter.shape))
    states = {
        key: (value if key == STEP else value.view(parameter.shape)).to(parameter.device)
        for key, value in mine.items()
        if key != WEIGHT
    }
    if states:
        optimizer.state[parameter] = states


def _write_flat(optimizer: Any, parameter: nn.Parameter, mine: ParameterStates) -> None:
    stored: Any = parameter
    fragment = stored._hp_mapping
    fragment.hp_fragment.copy_(mine[WEIGHT])
    for key in mine.keys() - {WEIGHT, STEP}:
        fragment.get_optim_state_fragment(key).copy_(mine[key])


def _write_partitioned(optimizer: Any, parameter: nn.Parameter, mine: ParameterStates) -> None:
    parameter.ds_tensor.copy_(mine[WEIGHT])  # type: ignore[attr-defined]
    safe_set_local_fp32_param(parameter, mine[WEIGHT])
    for key in mine.keys() - {WEIGHT, STEP}:
        safe_set_local_optimizer_state(parameter, mine[key], key)
