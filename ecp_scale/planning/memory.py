"""What DeepSpeed keeps of a model on one rank, in bytes, by ZeRO stage and precision (docs/scaling.md has the rules).

P is the number of elements of this rank's parameters, D the ranks that hold the same ones (replicas times context).
ZeRO-1 and -2 cut each of the optimizer's two groups into D flat partitions; ZeRO-3 cuts every parameter into D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FP32 = 4
ALIGNMENT = 2
"""DeepSpeed pads flat groups to multiples of so many elements per rank."""
PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 keeps smaller parameters whole on every rank (stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class States:
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
        """Their sum without what is on the host."""
        return self.weights + self.master_weights + self.moments + self.gradients + self.buffers - self.on_host


def states(
    decayed: Sequence[int],
    other: Sequence[int],
    *,
    stage: int,
    bf16: bool,
    data_ranks: int,
    adam: bool,
    bucket_elements: int,
    largest_block: int,
    offload_optimizer: bool,
    offload_parameters: bool,
) -> States:
    """Bytes of one rank.

    Args:
        decayed: elements of every parameter of the optimizer's first group (local).
        other: the same of the second.
        stage: of ZeRO.
        bf16: whether weights are bf16 with fp32 master weights and fp32 accumulation.
        data_ranks: D.
        adam: whether the optimizer has two moments; otherwise it has none.
        bucket_elements: reduce_bucket_size.
        largest_block: elements of the largest block, or of the embedding or output layer (local).
        offload_optimizer: whether master weights, moments and gradients are in CPU memory (ZeRO-2 and -3).
        offload_parameters: whether this rank's parts of the weights are (ZeRO-3).
    """
    everything = [*decayed, *other]
    whole = sum(everything)
    weight = 2 if bf16 else FP32
    bucket = min(bucket_elements, whole)
    if stage == 0:
        return States(FP32 * whole, 0, 2 * FP32 * whole * adam, FP32 * whole, FP32 * bucket)
    if stage == 3:
        part = sum(-(-elements // data_ranks) for elements in everything)
        small = sum(elements for elements in everything if elements <= PERSISTENT_ELEMENTS)
        weights = weight * (part + (small if data_ranks > 1 else 0))
        # Two blocks: the one that is computed, and the next, which is fetched.
        buffers = weight * (bucket + (2 * largest_block if data_ranks > 1 else 0))
        gradients = weight * part if not bf16 else FP32 * part
    else:
        part = sum(-(-sum(group) // (ALIGNMENT * data_ranks)) * ALIGNMENT for group in (decayed, other))
        weights, buffers = weight * whole, weight * bucket
        # ZeRO-1 accumulates whole gradients; in bf16 in fp32, beside those of the micro-batch.
        if stage == 1:
            gradients = (FP32 + (weight if bf16 else 0)) * whole
        elif bf16:
            gradients = FP32 * part
        else:
            gradients = FP32 * _most_whole_elements((decayed, other), data_ranks)
    master = FP32 * part
    moments = 2 * master * adam
    on_host = weight * part * offload_parameters
    if offload_optimizer:
        if stage < 3:
            # The host takes the sum for its update. In bf16 it is accumulated on the device all the same; in fp32 on
            # the host, to which one parameter at a time is added.
            buffers += weight * max(everything)
            gradients += master
            on_host += master if bf16 else gradients
        else:
            on_host += gradients
        on_host += master + moments
    return States(weights, master, moments, gradients, buffers, on_host)


def _most_whole_elements(groups: Sequence[Sequence[int]], data_ranks: int) -> int:
    """Elements of the parameters that reach into a rank's partitions, of the rank that has most of them.

    ZeRO-2 in fp32 keeps their gradients whole while it accumulates, also those that a border cuts.
    """
    held = [0] * data_ranks
    for group in groups:
        part = -(-sum(group) // (ALIGNMENT * data_ranks)) * ALIGNMENT
        start = 0
        for elements in group:
            for rank in range(start // part, (start + elements - 1) // part + 1):
                held[rank] += elements
            start += elements
    return max(held)
