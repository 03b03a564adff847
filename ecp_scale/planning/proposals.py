"""Layouts that fit a number of ranks and their memory, the ones that send least first."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import get_args

from ecp_scale.config import Config, ParallelConfig, Recompute
from ecp_scale.planning.plan import Plan, plan, trace_busiest
from ecp_scale.precision import weight_type
from ecp_scale.zero.memory import FP32

SUGGESTED = {
    "scaled-125m": (8, 1),
    "scaled-350m": (16, 1),
    "scaled-1b3": (32, 1),
    "scaled-6b7": (64, 1),
    "scaled-13b": (128, 2),
    "scaled-30b": (256, 2),
    "scaled-70b": (512, 2),
}
"""GPUs (of 80 GiB) and ZeRO stage for which each preset is laid out."""
NODE = 8
"""Ranks of a node, within which tensor parallelism should stay."""


def proposals(config: Config, world_size: int, memory: int) -> Iterator[Plan]:
    """Plans that fit, found one after another; every one is traced, so ask for no more than are wanted.

    Those with fewer ranks per replica come first, then those that compute less again; each with the lowest ZeRO stage.
    """
    for tensor, context, recompute in _candidates(world_size):
        layout = dataclasses.replace(
            config.parallel, tensor=tensor, context=context, sequence=tensor > 1, recompute=recompute
        )
        candidate = _with_batch(dataclasses.replace(config, parallel=layout), world_size)
        stages = [stage for stage in (1, 2, 3) if _least_bytes(candidate, layout, stage, world_size) <= memory]
        if candidate.problems(world_size) or not stages:
            continue
        traced = trace_busiest(candidate, world_size)
        plans = (plan(candidate, {"zero_optimization": {"stage": stage}}, world_size, traced) for stage in stages)
        fitting = next((found for found in plans if found.peak_bytes <= memory), None)
        if fitting is not None:
            yield fitting


def _candidates(world_size: int) -> Iterator[tuple[int, int, Recompute]]:
    powers = [2**exponent for exponent in range(world_size.bit_length())]
    pairs = [(t, c) for t, c in itertools.product(powers, powers) if t <= NODE and t * c <= world_size]
    for tensor, context in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
        yield from itertools.product([tensor], [context], get_args(Recompute))


def _with_batch(config: Config, world_size: int) -> Config:
    """The config with a global batch that every replica can share, the next above the one that was asked for."""
    together = config.training.micro_batch_size * config.parallel.data_parallel_size(world_size)
    batch = -(-config.training.global_batch_size // together) * together
    return dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=batch))


def _least_bytes(config: Config, layout: ParallelConfig, stage: int, world_size: int) -> float:
    """What a rank cannot do without, by parameters alone: cheap, to leave the hopeless out."""
    weight = weight_type(config).itemsize
    data_ranks = world_size // layout.tensor
    whole = weight * (1 if stage < 3 else 1 / data_ranks) + (FP32 + weight if stage == 1 else FP32 / data_ranks)
    return config.model.parameters / layout.tensor * (whole + 3 * FP32 / data_ranks)
