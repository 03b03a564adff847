"""Run by test_plans.py: plan layouts (one process), or train a micro-batch of each for real and measure (its ranks).

Arguments: plan or measure, a JSON file that lists {"ranks": ..., "options": command line, "states": ...}, and the file
to write. Memory is measured by torch's profiler and on the engine's own tensors, messages where they are handed to
torch.distributed.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import peak_bytes
from ecp_scale.command_line import Request, parse
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups, process_groups
from ecp_scale.planning.plan import TO_ALL, TO_OWNERS
from ecp_scale.precision import as_on_a_gpu, weight_type
from ecp_scale.zero import json_config


def planned(request: Request) -> dict[str, Any]:
    """What the planner says."""
    from ecp_scale.planning.plan import plan

    found = plan(request.config, request.deepspeed, request.world_size)
    held = found.states
    return {
        "parameters": found.trace.parameters,
        "weights": held.weights,
        "master_weights": held.master_weights,
        "moments": held.moments,
        "gradients": held.gradients,
        "activations": found.trace.activations,
        "sent by ZeRO": by_zero(found.messages),
        "sent": {" ".join(key): value for key, value in sorted(found.trace.sent.items())},
    }


def by_zero(messages: dict[str, int]) -> dict[str, int]:
    """Bytes of gradients, of weights and of Muon's momentum that ranks send each other in a step."""
    data = {name: value for name, value in messages.items() if name.startswith("data: ")}
    found = {"gradients": data.get(f"data: {TO_ALL}", 0) + data.get(f"data: {TO_OWNERS}", 0)}
    found["momentum"] = data.get("data: momentum of cut matrices", 0)
    found["weights"] = sum(data.values()) - found["gradients"] - found["momentum"]
    return {what: value for what, value in found.items() if value}


def size(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def measured(request: Request, with_states: bool) -> dict[str, Any]:
    """What is there; the states of DeepSpeed take several steps."""
    with process_groups(request.config.parallel) as groups:
        states = _states(request, groups) if with_states else {}
        return {**states, **_activations_and_messages(request, groups)}


def _states(request: Request, groups: Groups) -> dict[str, Any]:
    from ecp_scale.zero.averaging import stored_weights, update_average
    from ecp_scale.zero.engine import build_engine

    config = request.config
    settings = json_config.resolve(request.deepspeed, config, request.world_size)
    engine = build_engine(config, settings, groups)
    tokens = torch.zeros(config.training.micro_batch_size, config.model.sequence_length, dtype=torch.int64)
    micro_batches = config.accumulation_steps(request.world_size)
    messages = DataMessages(groups.data.group_name)
    for step in range(2):
        with messages if step == 1 else nullcontext():
            for number in range(micro_batches):
                engine.backward(engine(tokens, tokens)[0])
                if step == 1 and number == micro_batches - 2:
                    gradients = _gradients(engine)
                engine.step()
    if config.optimizer.average_decay is not None:
        update_average(engine, config.optimizer.average_decay, 1)
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    stage = engine.zero_optimization_stage()
    flats = stored_weights(engine) if stage else []
    base = optimizer if stage == 0 else optimizer.optimizer
    moments = [value for state in base.state.values() for key, value in state.items() if key != "step"]
    found = {
        "parameters": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
        "weights": size(parameter.ds_tensor for parameter in parameters) if stage == 3 else size(parameters),
        "master_weights": size(flats),
        "moments": size(moments),
        "gradients": gradients,
        "sent by ZeRO": dict(+messages.sent) if groups.data.size() > 1 or stage < 2 else {},
    }
    engine.destroy()
    return found


class DataMessages(TorchDispatchMode):
    """Counts the bytes that this rank hands to the group of ranks with the same parameters: gradients and weights.

    Single numbers (norms, overflows) are left out.
    """

    def __init__(self, group_name: str) -> None:
        super().__init__()
        self.group_name = group_name
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            leaves = tree_leaves(args)
            group = next(dist.ProcessGroup.unbox(leaf) for leaf in leaves if isinstance(leaf, torch.ScriptObject))
            operation = func._schema.name
            if group.group_name == self.group_name:
                tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
                kinds = {
                    "c10d::allreduce_": "gradients",
                    "c10d::reduce_": "gradients",
                    "c10d::_reduce_scatter_base_": "gradients",
                    "c10d::_allgather_base_": "weights",
                    "c10d::alltoall_base_": "momentum",
                }
                # But for the first two of these the first tensor is what they fill.
                given = tensors[:1] if operation in ("c10d::allreduce_", "c10d::reduce_") else tensors[1:]
                what = kinds[operation]
                self.sent[what] += sum(size([tensor]) for tensor in given if tensor.numel() > 1)
        return func(*args, **(kwargs or {}))


def _gradients(engine: Any) -> int:
    """Bytes that hold gradients while micro-batches are accumulated."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    own = size(parameter.grad for parameter in engine.module.parameters())
    if stage == 3:
        return size([optimizer.grad_partitions_flat_buffer])
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return size(optimizer.fp32_groups_gradients_flat) + size(
            parameter.grad if parameter.grad is not None else parameter for parameter in engine.module.parameters()
        )
    if stage == 2:
        held = [*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values()]
        tensors = [gradient for group in held for gradient in group or []]
        if optimizer.cpu_offload:
            tensors += optimizer.accumulated_grads_in_cpu.values()
            tensors += [flat.grad for flat in optimizer.single_partition_of_fp32_groups]
        return size(tensors)
    return own


def _activations_and_messages(request: Request, groups: Groups) -> dict[str, Any]:
    config = request.config
    parallel = ParallelContext.of(config, groups, weight_type(config))
    model = LanguageModel(config.model, parallel, config.attention).train()
    initialize(model, config.model, parallel, seed=1)
    tokens = torch.zeros(config.training.micro_batch_size, config.model.sequence_length, dtype=torch.int64)
    sent: Counter[str] = Counter()
    with as_on_a_gpu():
        model(tokens, tokens)[0].backward()
    # Trap: oneDNN's products of bf16 ask for room of their own, as much as the processor at hand makes them want.
    with as_on_a_gpu(), torch.backends.mkldnn.flags(enabled=False), counted(groups, sent):
        peak = peak_bytes(lambda: model(tokens, tokens)[0].backward())
    return {"activations": peak, "sent": dict(sorted(sent.items()))}


@contextmanager
def counted(groups: Groups, sent: "Counter[str]") -> Iterator[None]:
    """Count the bytes that this rank hands to torch.distributed, by group and operation, and do not send them.

    Trap: gloo works in threads of its own, and what they free last is not seen by torch's profiler, which then finds
    more memory alive than there is, by how the threads happened to run.
    """
    names = {id(groups.tensor): "tensor", id(groups.context): "context"}

    def count(operation: str, group: Any, tensor: Tensor) -> Any:
        sent[f"{names[id(group)]} {operation}"] += size([tensor])
        return SimpleNamespace(wait=lambda: None)

    def counter(operation: str, which: int) -> Callable[..., Any]:
        return lambda *arguments, group, **options: count(operation, group, arguments[which])

    def sends(operations: list[Any]) -> list[Any]:
        for item in operations:
            if item.op is dist.isend:
                count("send", item.group, item.tensor)
        return []

    gather, scatter = counter("allgather_base", 1), counter("reduce_scatter_base", 1)
    # Megatron has bound two of them to names of its own.
    megatron = "megatron.core.tensor_parallel.mappings"
    with (
        mock.patch(f"{megatron}.dist_all_gather_func", gather),
        mock.patch(f"{megatron}.dist_reduce_scatter_func", scatter),
        mock.patch.object(dist, "all_gather_into_tensor", gather),
        mock.patch.object(dist, "reduce_scatter_tensor", scatter),
        mock.patch.object(dist, "all_reduce", counter("allreduce", 0)),
        mock.patch.object(dist, "batch_isend_irecv", sends),
    ):
        yield


def main() -> None:
    """Plan or measure every command line of the list."""
    what, jobs, output = sys.argv[-3:]
    results = []
    if what == "measure":
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        dist.init_process_group("gloo")
    for job in json.loads(Path(jobs).read_text()):
        request = parse(job["options"], "", world_size=job["ranks"])
        results.append(planned(request) if what == "plan" else measured(request, job.get("states", True)))
    mine = int(os.environ.get("RANK", "0"))
    Path(f"{output}.{mine}").write_text(json.dumps(results))
    if what == "measure":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
