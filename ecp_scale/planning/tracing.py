"""A model's shapes, activations and messages, read off the model itself without allocating it.

One micro-batch runs forward and backward on fake tensors (shapes without memory) in a fake launch (a process group
whose messages go nowhere), so that what is counted is what the code does, whatever it becomes. Layers repeat: a shallow
model and one with a layer more tell what every further layer adds.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecp_scale.config import Config
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.parameter_groups import optimizer_groups
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups, process_groups
from ecp_scale.planning.compiled import compiled_in_shapes
from ecp_scale.planning.flash_shapes import flash_in_shapes
from ecp_scale.precision import as_on_a_gpu, weight_type
from ecp_scale.zero.muon import Matrix, matrices_of

SHALLOW = 3
"""Layers of the shallow model: a first, a middle and a last one."""
SENDING = {"allreduce_", "_allgather_base_", "_reduce_scatter_base_", "send"}


@dataclass(frozen=True)
class Trace:
    """One rank's share of the model, and one micro-batch of it.

    ``groups`` are the elements of every parameter (local) of the optimizer's groups, of which it keeps so many numbers
    of an element as ``kept`` says; ``activations`` the largest number of bytes alive at once beside the parameters;
    ``sent`` the bytes that the rank sends in forward and backward, by (group, operation): what goes into an all-reduce,
    a gather or a reduce-scatter, or to a neighbour.
    """

    groups: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    activations: int
    sent: dict[tuple[str, str], int]
    matrices: tuple[Matrix, ...] = ()
    """What Muon updates."""

    @property
    def parameters(self) -> int:
        """Elements of all parameters of this rank, with the padding of the vocabulary."""
        return sum(map(sum, self.groups))


def trace(config: Config, world_size: int, rank: int = 0) -> Trace:
    """Trace one rank of a launch; ``config`` must fit ``world_size`` and know its vocabulary."""
    with as_on_a_gpu(), _fake_launch(world_size, rank), _groups(config) as groups:
        found = _deepened(config, groups)
        with FakeTensorMode():
            whole = LanguageModel(config.model, _context(config, groups), config.attention)
            optimized = optimizer_groups(whole, config.optimizer.name)
            elements = tuple(tuple(value.numel() for value in group.parameters.values()) for group in optimized)
        kept = tuple(config.optimizer.states(group.orthogonal) for group in optimized)
        return Trace(elements, kept, found.peak, dict(found.sent), tuple(matrices_of(optimized)))


@dataclass(frozen=True)
class _MicroBatch:
    """Largest number of bytes alive at once, those alive between forward and backward, and bytes sent."""

    peak: int
    kept: int
    sent: Counter[tuple[str, str]]


def _deepened(config: Config, groups: Groups) -> _MicroBatch:
    """A micro-batch of the whole model, from those of two shallow ones that differ by a layer.

    A further layer adds to the peak what it keeps for the backward pass. Where layers keep next to nothing (recompute:
    full), the peak of a shallow model can lie in the embedding instead; what comes out is then an upper bound.
    """
    layers = config.model.layers
    more = _micro_batch(config, min(layers, SHALLOW + 1), groups)
    if layers <= SHALLOW + 1:
        return more
    less, times = _micro_batch(config, SHALLOW, groups), layers - SHALLOW - 1
    sent = {key: value + times * (value - less.sent[key]) for key, value in more.sent.items()}
    return _MicroBatch(more.peak + times * (more.kept - less.kept), more.kept, Counter(sent))


def _micro_batch(config: Config, layers: int, groups: Groups) -> _MicroBatch:
    """One forward and backward pass of a model of so many layers."""
    model_config = dataclasses.replace(config.model, layers=layers, allow_short_receptive_field=True, dropout=0.0)
    names: dict[str, str] = {groups.tensor.group_name: "tensor", groups.context.group_name: "context"}
    # Compiled functions keep their inputs alone; "auto" compiles them on the GPU that is planned for.
    kernels = compiled_in_shapes() if config.training.compile else nullcontext()
    with FakeTensorMode(), _Messages(names) as messages, kernels, flash_in_shapes():
        model = LanguageModel(model_config, _context(config, groups), config.attention).train()
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            shape = (config.training.micro_batch_size, config.model.sequence_length)
            total, _ = model(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
            kept = _activations(tracker, "current")
            total.backward()
        return _MicroBatch(_activations(tracker, "peak"), kept, messages.sent)


def _activations(tracker: MemTracker, when: Literal["current", "peak"]) -> int:
    """Bytes alive, without parameters and their gradients, which are counted by the rules of ZeRO."""
    found = tracker.get_tracker_snapshot(when)[torch.device("cpu")]
    return sum(value for kind, value in found.items() if "ACT" in str(kind) or "TEMP" in str(kind))


def _context(config: Config, groups: Groups) -> ParallelContext:
    parallel = ParallelContext.of(config, groups, weight_type(config))
    return dataclasses.replace(parallel, compiled=config.training.compile is not False)


class _Messages(TorchDispatchMode):
    """Counts the bytes of collectives and sends."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names
        self.sent: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            operation = func._schema.name.removeprefix("c10d::")
            if operation in SENDING:
                leaves = tree_leaves(args)
                group = next(dist.ProcessGroup.unbox(leaf) for leaf in leaves if isinstance(leaf, torch.ScriptObject))
                tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
                # A gather's first argument is what it fills.
                message = tensors[-1] if operation in ("_allgather_base_", "_reduce_scatter_base_") else tensors[0]
                kind = self.names.get(group.group_name, "data")
                self.sent[kind, operation.strip("_")] += message.numel() * message.element_size()
        return func(*args, **(kwargs or {}))


@contextmanager
def _groups(config: Config) -> Iterator[Groups]:
    """Groups of ranks on a CPU, also where there is a GPU, which Megatron-core would allocate on without asking."""
    device = torch.device("cpu")
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=device),
        process_groups(config.parallel, device=device) as groups,
    ):
        yield groups


@contextmanager
def _fake_launch(world_size: int, rank: int) -> Iterator[None]:
    assert not dist.is_initialized(), "a plan is made before a launch"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
