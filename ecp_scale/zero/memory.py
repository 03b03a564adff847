"""What DeepSpeed keeps of a model on one rank, in bytes, by ZeRO stage and precision (docs/scaling.md has the rules).

P is the number of elements of this rank's parameters, D the ranks that hold the same ones (replicas times context).
ZeRO-1 and -2 cut each group of the optimizer (two, and of muon three) into D flat partitions; ZeRO-3 cuts every
parameter into D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

ZeroConfig: TypeAlias = DeepSpeedZeroConfig
"""Section ``zero_optimization`` of the DeepSpeed JSON, with DeepSpeed's defaults."""
FP32 = 4
ALIGNMENT = 2
"""DeepSpeed pads flat groups to multiples of so many elements per rank."""


@dataclass(frozen=True)
class EngineStates:
    """Bytes on one rank that last from step to step; ``on_host`` are in CPU memory instead."""

    weights: int
    """As the forward pass reads them; with ZeRO-3 this rank's parts, and the small ones whole."""
    master_weights: int
    """In fp32, apart from ``weights``."""
    moments: int
    """Of Adam."""
    gradients: int
    """While micro-batches are accumulated."""
    buffers: int
    """To reduce gradients in, and with ZeRO-3 the parameters that are whole at a time."""
    on_host: int = 0
    """Of master weights, moments and gradients under optimizer offload, of weights under parameter offload."""

    @property
    def on_device(self) -> int:
        """Sum of all states that are not in CPU memory."""
        return self.weights + self.master_weights + self.moments + self.gradients + self.buffers - self.on_host


def states(
    groups: Sequence[Sequence[int]],
    kept: Sequence[int],
    zero: ZeroConfig,
    *,
    bf16: bool,
    sent_bytes: int,
    data_ranks: int,
    largest_block: int,
) -> EngineStates:
    """Bytes of one rank.

    Args:
        groups: elements of every parameter (local), for each group of the optimizer.
        kept: numbers that the optimizer keeps of each element, for each group.
        zero: stage, sizes and offload.
        bf16: whether weights are bf16 with fp32 master weights and fp32 accumulation.
        sent_bytes: of an element of a gradient on its way to other ranks.
        data_ranks: D.
        largest_block: elements of the largest block, or of the embedding or output layer (local).
    """
    everything = [elements for group in groups for elements in group]
    whole = sum(everything)
    weight = 2 if bf16 else FP32
    bucket = min(zero.reduce_bucket_size, whole)
    converted = sent_bytes * bucket if sent_bytes != weight and data_ranks > 1 else 0
    if zero.stage == 0:
        moments = sum(FP32 * number * sum(group) for number, group in zip(kept, groups, strict=True))
        return EngineStates(FP32 * whole, 0, moments, FP32 * whole, FP32 * bucket)
    if zero.stage == 3:
        parts = [sum(-(-elements // data_ranks) for elements in group) for group in groups]
        part = sum(parts)
        small = persistent(everything, zero)
        weights = weight * (part + (small if data_ranks > 1 else 0))
        # Of the others, two blocks at least: the one that is computed, and the next, which is fetched.
        alive = min(whole - small, max(zero.max_live_parameters, 2 * largest_block))
        buffers = weight * (bucket + (alive if data_ranks > 1 else 0)) + converted
        gradients = weight * part if not bf16 else FP32 * part
    else:
        parts = [partition_elements(group, data_ranks) for group in groups]
        part = sum(parts)
        weights, buffers = weight * whole, weight * bucket + converted
        # ZeRO-1 accumulates whole gradients; in bf16 in fp32, beside those of the micro-batch.
        if zero.stage == 1:
            gradients = (FP32 + (weight if bf16 else 0)) * whole
        elif bf16:
            gradients = FP32 * part
        else:
            gradients = FP32 * _most_whole_elements(groups, data_ranks)
    master = FP32 * part
    moments = sum(FP32 * number * size for number, size in zip(kept, parts, strict=True))
    on_host = weight * part * is_on_host(zero.offload_param)
    if is_on_host(zero.offload_optimizer):
        if zero.stage < 3:
            # The host takes the sum for its update. In bf16 it is accumulated on the device all the same; in fp32 on
            # the host, to which one parameter at a time is added.
            buffers += weight * max(everything)
            gradients += master
        on_host += master + moments + (master if zero.stage < 3 and bf16 else gradients)
    return EngineStates(weights, master, moments, gradients, buffers, on_host)


def partition_elements(group: Sequence[int], data_ranks: int) -> int:
    """Elements of a rank's flat partition of a group of parameters under ZeRO-1 and -2, with its padding."""
    return -(-sum(group) // (ALIGNMENT * data_ranks)) * ALIGNMENT


def persistent(parameters: Sequence[int], zero: ZeroConfig) -> int:
    """Elements of the parameters that ZeRO-3 keeps whole on every rank, since they are small."""
    return sum(elements for elements in parameters if elements <= zero.param_persistence_threshold)


def is_on_host(offload: Any) -> bool:
    """Whether a section offload_optimizer or offload_param sends its states to CPU memory."""
    return offload is not None and offload.device == "cpu"


def _most_whole_elements(groups: Sequence[Sequence[int]], data_ranks: int) -> int:
    """Elements of the parameters that reach into a rank's partitions, of the rank that has most of them.

    ZeRO-2 in fp32 keeps their gradients whole while it accumulates, also those that a border cuts.
    """
    held = [0] * data_ranks
    for group in groups:
        part = partition_elements(group, data_ranks)
        start = 0
        for elements in group:
            for rank in range(start // part, (start + elements - 1) // part + 1):
                held[rank] += elements
            start += elements
    return max(held)
