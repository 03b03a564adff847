"""The plan of a run: what every rank holds, computes and sends, and how long a number of tokens takes."""

from dataclasses import dataclass
from typing import Any

from ecp_scale.config import Config
from ecp_scale.planning.tracing import Trace, trace
from ecp_scale.precision import weight_type
from ecp_scale.zero import json_config
from ecp_scale.zero.memory import FP32, EngineStates, ZeroConfig, partition_elements, persistent, states
from ecp_scale.zero.muon import busiest

GIB = 1 << 30
CONTEXT_BYTES = GIB
"""Of CUDA, its libraries' workspaces included: a rule of thumb."""
COMMUNICATOR_BYTES = GIB // 2
"""Of NCCL, for every kind of group that a rank shares with others: a rule of thumb."""
TO_ALL, TO_OWNERS = "gradients", "gradients to owners"
"""Messages of gradients: summed on all ranks, or each on the rank that keeps it alone."""


@dataclass(frozen=True)
class Plan:
    """A layout in numbers. Memory and messages are those of one rank; messages are per optimizer step."""

    config: Config
    world_size: int
    stage: int
    trace: Trace
    states: EngineStates
    messages: dict[str, int]
    checkpoint_bytes: int
    flops_per_step: float

    @property
    def system_bytes(self) -> int:
        """What CUDA and NCCL take beside torch's tensors."""
        parallel = self.config.parallel
        sizes = (parallel.tensor, parallel.context, self.world_size // parallel.tensor, self.world_size)
        return CONTEXT_BYTES + COMMUNICATOR_BYTES * sum(size > 1 for size in sizes)

    @property
    def peak_bytes(self) -> int:
        """Everything that may be there at once."""
        return self.states.on_device + self.trace.activations + self.system_bytes

    @property
    def start_bytes(self) -> int:
        """What is there before the first step: the weights, and beside them what the engine makes of them.

        ZeRO-1 and -2 make the weights one flat tensor, a copy for a while; ZeRO-1 in bf16 has room for fp32 gradients.
        """
        states = self.states
        copies = states.weights if self.stage in (1, 2) else 0
        in_fp32 = self.stage == 1 and self.config.training.precision == "bf16"
        gradients = states.gradients - states.weights if in_fp32 else 0
        return states.weights + copies + states.master_weights + gradients + self.system_bytes

    @property
    def saved_bytes(self) -> int:
        """What a rank saves, at most, and copies to host memory where checkpoints are written behind the training."""
        return self.states.weights + self.states.master_weights + self.states.moments

    @property
    def options(self) -> str:
        """The options of ecp-pretrain that make this layout of its config."""
        parallel, training = self.config.parallel, self.config.training
        return (
            f"--parallel.tensor {parallel.tensor} --parallel.context {parallel.context} --parallel.sequence "
            f"{str(parallel.sequence).lower()} --parallel.recompute {parallel.recompute} --training.micro_batch_size "
            f"{training.micro_batch_size} --training.global_batch_size {training.global_batch_size} "
            f"--deepspeed_config zero{self.stage}"
        )

    def describe(self) -> str:
        """As the planner prints it."""
        parallel, states = self.config.parallel, self.states
        replicas = parallel.data_parallel_size(self.world_size)
        of_one = f"of one rank at most {self.saved_bytes / GIB:.2f} GiB"
        sizes = {
            "weights": states.weights,
            "master weights": states.master_weights,
            "optimizer states": states.moments,
            "gradients": states.gradients,
            "buffers": states.buffers,
            "activations": self.trace.activations,
            "CUDA and NCCL": self.system_bytes,
            "on the host instead": -states.on_host,
            "peak": self.peak_bytes,
        }
        lines = [
            f"layout              {self.world_size} ranks = tensor {parallel.tensor} x context {parallel.context} "
            f"x replicas {replicas}; ZeRO-{self.stage}, sequence {parallel.sequence}, recompute {parallel.recompute}",
            f"parameters          {self.config.model.parameters:,}; {self.trace.parameters:,} on a rank",
            f"step                {self.config.tokens_per_step:,} tokens, {self.flops_per_step:.3e} FLOPs, "
            f"{self.config.accumulation_steps(self.world_size)} micro-batches per rank",
            "bytes of a rank",
            *(f"  {name:20s}{size / GIB:10.3f} GiB" for name, size in sizes.items()),
            "bytes that a rank sends per step",
            *(f"  {name:36s}{size / GIB:10.3f} GiB" for name, size in self.messages.items()),
            f"checkpoint          {self.checkpoint_bytes / GIB:.1f} GiB, {of_one}",
            f"start               {self.start_bytes / GIB:.2f} GiB on a rank before its first step",
        ]
        if self.config.checkpoint.asynchronous:
            lines.append(
                f"copies on the host  {self.saved_bytes / GIB:.2f} GiB of a rank, for saves behind the training"
            )
        return "\n".join(lines)


def plan(config: Config, deepspeed: dict[str, Any], world_size: int, traced: Trace | None = None) -> Plan:
    """Plan a launch; config and JSON must fit each other and ``world_size``. ``traced`` is its trace, where known."""
    section = json_config.resolve(deepspeed, config, world_size).get("zero_optimization", {})
    zero, sent_bytes = ZeroConfig(**section), json_config.sent_bytes(deepspeed, config)
    parallel = config.parallel
    data_ranks = world_size // parallel.tensor
    traced = traced or trace_busiest(config, world_size)
    ends = _input(config), _output(config)
    per_layer = (traced.parameters - sum(ends)) // config.model.layers
    held = states(
        traced.groups,
        traced.kept,
        zero,
        bf16=config.training.precision == "bf16",
        sent_bytes=sent_bytes,
        data_ranks=data_ranks,
        largest_block=max(per_layer, *ends),
    )
    micro_batches = config.accumulation_steps(world_size)
    messages = {f"{group}: {name}": size * micro_batches for (group, name), size in sorted(traced.sent.items())}
    messages |= zero_messages(traced, config, zero, data_ranks, micro_batches, sent_bytes)
    messages |= muon_messages(traced, zero, data_ranks, parallel.tensor)
    master = 0 if zero.stage == 0 else FP32
    moments = sum(FP32 * number * sum(group) for number, group in zip(traced.kept, traced.groups, strict=True))
    saved = parallel.tensor * (traced.parameters * (weight_type(config).itemsize + master) + moments)
    flops = config.model.flops_per_token * config.tokens_per_step
    return Plan(config, world_size, zero.stage, traced, held, messages, saved, flops)


def trace_busiest(config: Config, world_size: int) -> Trace:
    """Trace the rank with the second run of a sequence: it has two neighbours, or sends as much as the first."""
    return trace(config, world_size, config.parallel.tensor if config.parallel.context > 1 else 0)


def _input(config: Config) -> int:
    """Elements, on one rank, of what makes the input of the first layer."""
    model = config.model
    table = _output(config) if model.inputs == "tokens" else 2 * model.width
    return table + model.learnt_positions * model.sequence_length * model.width


def _output(config: Config) -> int:
    """Elements, on one rank, of the output layer."""
    return config.model.padded_vocab_size(config.parallel.tensor) // config.parallel.tensor * config.model.width


def muon_messages(traced: Trace, zero: ZeroConfig, data_ranks: int, tensor_ranks: int) -> dict[str, int]:
    """Bytes of momentum that Muon sends per step, of the rank that sends most: whole matrices need all of it."""
    if not traced.matrices:
        return {}
    parts = data_ranks if zero.stage else 1
    length = partition_elements(traced.groups[0], parts)  # Muon's group is the first
    to_data, to_tensor = busiest(traced.matrices, length, parts)
    found = {
        "data: momentum of cut matrices": FP32 * to_data,
        "tensor: momentum": FP32 * to_tensor * (tensor_ranks > 1),
    }
    return {name: size for name, size in found.items() if size}


def sent_to_owners(config: Config, zero: ZeroConfig) -> bool:
    """Whether a gradient is summed on the rank that keeps it alone. DeepSpeed's default is all ranks up to ZeRO-2."""
    partitions = zero.stage == 2 or (zero.stage == 1 and config.training.precision == "fp32")
    return zero.stage == 3 or (partitions and zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce)


def zero_messages(
    traced: Trace, config: Config, zero: ZeroConfig, data_ranks: int, micro_batches: int, gradient_bytes: int
) -> dict[str, int]:
    """Bytes that ZeRO sends per step, by what they are: gradients, and this rank's own part of the weights.

    ``gradient_bytes``: of an element of a gradient on its way.

    Exact, but for ZeRO-3 where not all large parameters may stay whole from the forward to the backward pass
    (stage3_max_live_parameters, stage3_max_reuse_distance): then it is the most, as if none did.
    """
    if data_ranks == 1:
        return {}
    elements = traced.parameters
    weight = weight_type(config).itemsize
    # ZeRO-0 and -1 reduce once per step, ZeRO-2 and -3 after every micro-batch.
    reductions = micro_batches if zero.stage >= 2 else 1
    found = {f"data: {TO_OWNERS if sent_to_owners(config, zero) else TO_ALL}": elements * gradient_bytes * reductions}
    if zero.stage in (1, 2):
        found["data: updated weights"] = elements // data_ranks * weight
    if zero.stage == 3:
        small = persistent([size for group in traced.groups for size in group], zero)
        passes = 3 if config.parallel.recompute == "full" else 2
        if elements - small <= min(zero.max_live_parameters, zero.max_reuse_distance):
            passes = 1
        found["data: updated small weights"] = small // data_ranks * weight
        found["data: weights for every pass"] = (elements - small) // data_ranks * weight * passes * micro_batches
    return found
