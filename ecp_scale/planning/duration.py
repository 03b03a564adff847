"""How long a step of a plan takes, by arithmetic on a machine that is described in a few numbers: an estimate.

A micro-batch takes what its products take, or what the host takes to ask for its kernels, whichever is longer; messages
come on top of that, none hidden behind products, so that the estimate errs towards layouts that send less.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ecp_scale.parallel.device import PEAK_TERAFLOPS
from ecp_scale.planning.plan import TO_ALL, TO_OWNERS, Plan

GB = 1e9
OPERATIONS = {
    "allreduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "allgather_base": lambda ranks: ranks - 1,
    "reduce_scatter_base": lambda ranks: (ranks - 1) / ranks,
    TO_ALL: lambda ranks: 2 * (ranks - 1) / ranks,
    TO_OWNERS: lambda ranks: (ranks - 1) / ranks,
    "updated weights": lambda ranks: ranks - 1,
    "updated small weights": lambda ranks: ranks - 1,
    "weights for every pass": lambda ranks: ranks - 1,
}
"""Bytes that a ring puts on the wire of a rank, for each byte that the rank gives to an operation."""


def on_wire(operation: str, ranks: int) -> float:
    """Bytes that a rank sends to others, for each that it gives to an operation of so many ranks."""
    return OPERATIONS[operation](ranks) if operation in OPERATIONS else 1


@dataclass(frozen=True)
class Machine:
    """What steps take their time from. Defaults are of nodes of eight H100; only the first and last are measured."""

    utilisation: float = 0.48
    """Share of the peak in forward and backward passes on one GPU: what scaled-1b3 has on an H100, without messages."""
    peak_teraflops: float = PEAK_TERAFLOPS["NVIDIA H100 80GB HBM3"][0]
    """Of one GPU, in the run's precision, by its datasheet."""
    node_ranks: int = 8
    """GPUs that a node joins."""
    node_gigabytes: float = 300.0
    """Per second, from a GPU to others of its node, in a collective."""
    network_gigabytes: float = 40.0
    """Per second, from a GPU to other nodes, in a collective."""
    disk_gigabytes: float = 5.0
    """Per second, to the file system, from all ranks together."""
    layer_milliseconds: float = 6.4
    """That the host takes to ask for the kernels of a layer, forward and backward: paper-12l on a host of an H100."""


class Duration(NamedTuple):
    """Seconds of an optimizer step on one rank."""

    products: float
    again: float
    """What is computed again in the backward pass."""
    host: float
    """What the host takes longer than the device, where micro-batches are small."""
    tensor: float
    context: float
    data: float

    @property
    def whole(self) -> float:
        """Of the step."""
        return sum(self)


def duration(plan: Plan, machine: Machine) -> Duration:
    """Seconds of a step of a plan on a machine."""
    config, parallel = plan.config, plan.config.parallel
    products = plan.flops_per_step / (plan.world_size * machine.peak_teraflops * 1e12 * machine.utilisation)
    # A third of the whole is the forward pass, all or the attention of which is done twice.
    model = config.model
    attention = 3 * 4 * model.width * model.score_pairs / (model.flops_per_token * model.sequence_length)
    again = products / 3 * {"none": 0.0, "selective": attention, "full": 1.0}[parallel.recompute]
    passes = 4 / 3 if parallel.recompute == "full" else 1.0
    layers = config.accumulation_steps(plan.world_size) * config.model.layers
    asked = passes * layers * machine.layer_milliseconds / 1000
    sizes = {
        "tensor": (parallel.tensor, parallel.tensor),
        "context": (parallel.context, parallel.tensor * parallel.context),
        "data": (plan.world_size // parallel.tensor, plan.world_size),
    }
    seconds = dict.fromkeys(sizes, 0.0)
    for name, given in plan.messages.items():
        group, _, operation = name.partition(": ")
        ranks, reach = sizes[group]
        speed = machine.node_gigabytes if reach <= machine.node_ranks else machine.network_gigabytes
        seconds[group] += on_wire(operation, ranks) * given / (speed * GB)
    return Duration(products, again, max(0.0, asked - products - again), **seconds)


def model_utilisation(plan: Plan, machine: Machine) -> float:
    """Share of the peak that the model's own arithmetic has of the whole step."""
    ranks = plan.world_size
    return plan.flops_per_step / (duration(plan, machine).whole * ranks * machine.peak_teraflops * 1e12)
