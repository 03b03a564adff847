"""Fill an engine from a checkpoint of any layout: another number of ranks, another ZeRO stage or precision.

Every rank reads the elements of each parameter that its engine holds in fp32, and no others. Under ZeRO-1 and ZeRO-2
the ranks then tell each other the weights as they do after a step.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import nn

from ecp_scale.models.parameter_groups import optimizer_groups
from ecp_scale.parallel.partition import Partition, Share
from ecp_scale.zero.averaging import stored_weights
from ecp_scale.zero.making import held_weight
from ecp_scale.zero.muon import Muon
from ecp_scale.zero.saved_states import STEP, WEIGHT, ParameterStates


class States(Protocol):
    """Where the states of parameters come from, see ``SavedStates``."""

    def keys(self, name: str) -> list[str]:
        """Which states of a parameter there are."""

    def read(self, name: str, share: Share, start: int, stop: int, keys: Sequence[str]) -> ParameterStates:
        """Some elements of a parameter, in fp32."""


@torch.no_grad()
def fill(engine: deepspeed.DeepSpeedEngine, saved: States) -> None:
    """Fill an engine, new or not; before its next step, ``share_weights``.

    Args:
        engine: of any partition.
        saved: the states of all its parameters.
    """
    parallel = engine.module.parallel
    write = {0: _write_plain, 3: _write_partitioned}.get(engine.zero_optimization_stage(), _write_flat)
    begin_states(engine, saved)
    for name, parameter in engine.module.named_parameters():
        held = held_weight(parameter)
        share = Partition.of(parameter).share(held.shape, parallel.tp_size, parallel.tp_rank)
        start, stop = owned(parameter, held.start, held.values.numel())
        if stop > start:
            write(engine.optimizer, parameter, saved.read(name, share, start, stop, saved.keys(name)))


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


def begin_states(engine: deepspeed.DeepSpeedEngine, saved: States) -> None:
    """Give the optimizer of a ZeRO engine the states that its first step would; they are filled later."""
    if engine.zero_optimization_stage() == 0:
        return
    optimizer, flats = engine.optimizer, stored_weights(engine)
    groups = optimizer_groups(engine.module, "muon" if isinstance(engine.basic_optimizer, Muon) else "adamw")
    names = [next(iter(group.parameters)) for group in groups]
    if len(names) != len(flats):  # ZeRO-3 may cut a group in several, all of which have the same states
        names = names[:1] * len(flats)
    for name, flat in zip(names, flats, strict=True):
        keys = [key for key in saved.keys(name) if key != WEIGHT]
        states = {key: torch.zeros_like(flat) for key in keys if key != STEP}
        if STEP in keys:
            nothing = Share(1, 0, 0, 0, 0)
            # On its device, where torch's fused AdamW wants it.
            states |= {key: value.to(flat.device) for key, value in saved.read(name, nothing, 0, 0, [STEP]).items()}
        if states:
            optimizer.optimizer.state[flat] = states
    if any(optimizer.optimizer.state.values()) and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Trap: it ties fragments to states once, and an engine that has made steps is tied to those before these.
        optimizer._hp_optimizer_states_linked = False
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
