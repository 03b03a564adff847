"""Which parameters decay, and the order in which the optimizer has all of them."""

from torch import nn

from ecp_scale.models.linear import ColumnLinear, RowLinear


def decayed_and_other(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters by name: the weights of linear layers, which decay, then all others (the paper's recipe)."""
    modules = (module for module in model.modules() if isinstance(module, ColumnLinear | RowLinear | nn.Linear))
    chosen = {id(module.weight) for module in modules}
    named = dict(model.named_parameters())
    return (
        {name: value for name, value in named.items() if id(value) in chosen},
        {name: value for name, value in named.items() if id(value) not in chosen},
    )
