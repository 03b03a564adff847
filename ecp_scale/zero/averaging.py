"""The moving average of the weights, a state of the optimizer like any other: kept in parts, resumed in any layout."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # a model that is exported or loaded needs no DeepSpeed, only the name of this state
    from deepspeed import DeepSpeedEngine

AVERAGE = "average"
"""Key of it among the states of a parameter."""


def stored_weights(engine: "DeepSpeedEngine") -> list[Tensor]:
    """What the optimizer holds of this rank's fp32 weights: flat tensors under ZeRO, else the parameters."""
    of_zero_1_and_2 = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups")  # bf16 under ZeRO-1 has its own
    for name in ("fp32_partitioned_groups_flat", *of_zero_1_and_2):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def update_average(engine: "DeepSpeedEngine", decay: float, step: int) -> None:
    """Let the average follow the weights after a step.

    Args:
        engine: that has made it.
        decay: share of the average that stays; early steps, of which it would remember too much, keep less.
        step: number of the step, from 1 on.
    """
    kept = min(decay, (1 + step) / (10 + step))
    states = engine.basic_optimizer.state
    for weights in stored_weights(engine):
        average = states[weights].get(AVERAGE)
        if average is None:
            states[weights][AVERAGE] = weights.detach().clone()
        else:
            average.lerp_(weights, 1 - kept)


def drop_average(engine: "DeepSpeedEngine") -> None:
    """Forget the average that a checkpoint has brought."""
    for state in engine.basic_optimizer.state.values():
        state.pop(AVERAGE, None)
    for parameter in engine.module.parameters():
        fragment = getattr(parameter, "_hp_mapping", None)  # of ZeRO-1 and -2, which may refer to it, too
        if fragment is not None and fragment.optim_fragment is not None:
            fragment.optim_fragment.pop(AVERAGE, None)
