"""Which parameters decay, which Muon updates, and the order in which the optimizer has all of them."""

from typing import NamedTuple

from torch import nn

from ecp_scale.parallel.linear import ColumnLinear, RowLinear

OUTPUT_LAYER = "output.weight"


class OptimizerGroup(NamedTuple):
    """Parameters that the optimizer treats alike."""

    parameters: dict[str, nn.Parameter]
    """By name."""
    decays: bool
    orthogonal: bool = False
    """Whether Muon makes their updates orthogonal: they are matrices."""


def optimizer_groups(model: nn.Module, optimizer: str = "adamw") -> list[OptimizerGroup]:
    """The weights of linear layers, which decay, then all others (the paper's recipe).

    Of the former Muon (arXiv 2502.16982) has all but the output layer's, which then are a group of their own. The order
    of the parameters is the same for all optimizers.

    Args:
        model: of any layout.
        optimizer: name of it, as optimizer.name.
    """
    modules = (module for module in model.modules() if isinstance(module, ColumnLinear | RowLinear | nn.Linear))
    chosen = {id(module.weight) for module in modules}
    named = dict(model.named_parameters())
    decayed = {name: value for name, value in named.items() if id(value) in chosen}
    others = OptimizerGroup({name: value for name, value in named.items() if id(value) not in chosen}, decays=False)
    if optimizer != "muon":
        return [OptimizerGroup(decayed, decays=True), others]
    output = {OUTPUT_LAYER: decayed.pop(OUTPUT_LAYER)}
    return [OptimizerGroup(decayed, decays=True, orthogonal=True), OptimizerGroup(output, decays=True), others]


def optimizer_order(model: nn.Module) -> list[str]:
    """Names of all parameters in the order in which the optimizer has them."""
    return [name for group in optimizer_groups(model) for name in group.parameters]
