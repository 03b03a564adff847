"""Which parameters decay, and the order in which the optimizer has all of them."""

from typing import Any

from torch import nn

from ecp_scale.parallel.linear import ColumnLinear, RowLinear


def weight_decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters by name: the weights of linear layers, which decay, then all others (the paper's recipe)."""
    modules = (module for module in model.modules() if isinstance(module, ColumnLinear | RowLinear | nn.Linear))
    chosen = {id(module.weight) for module in modules}
    named = dict(model.named_parameters())
    return (
        {name: value for name, value in named.items() if id(value) in chosen},
        {name: value for name, value in named.items() if id(value) not in chosen},
    )


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of ``weight_decay_groups`` as torch's optimizers take them."""
    decayed, other = weight_decay_groups(model)
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(other.values()), "weight_decay": 0.0},
    ]
