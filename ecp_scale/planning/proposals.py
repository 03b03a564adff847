"""Layouts that fit a number of ranks and their memory."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import get_args

from ecp_scale.config import Config, ParallelConfig, Recompute
from ecp_scale.planning.plan import Plan, plan, trace_busiest
from ecp_scale.precision import weight_type
from ecp_scale.zero import json_config
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
TRIED = 10
"""Layouts that are looked at."""
NODE = 8
"""Ranks of a node, within which tensor parallelism should stay."""


def proposals(config: Config, world_size: int, memory: int) -> Iterator[Plan]:
    """Plans that fit, of as many layouts as are tried: every one is traced, which takes seconds.

    The config's own layout is tried first, then those with fewer ranks per replica. Of each layout it is the one that
    computes least again, with the largest micro-batch up to the config's, and the lowest ZeRO stage. The global batch
    stays, unless no layout can share it out: then it is the next larger one that a layout can.
    """
    own = (config.parallel.tensor, config.parallel.context)
    others = [pair for pair in _layouts(world_size) if pair != own]
    layouts = others if world_size % (own[0] * own[1]) else [own, *others]
    shares = [pair for pair in layouts if _micro_batches(config, world_size // (pair[0] * pair[1]))]
    for tensor, context in (shares or layouts)[:TRIED]:
        for recompute in get_args(Recompute):
            layout = dataclasses.replace(
                config.parallel, tensor=tensor, context=context, sequence=tensor > 1, recompute=recompute
            )
            found = _fitting(dataclasses.replace(config, parallel=layout), world_size, memory)
            if found is not None:
                yield found
                break


def _fitting(config: Config, world_size: int, memory: int) -> Plan | None:
    """The plan of a layout with the largest micro-batch and the lowest ZeRO stage that fit."""
    stages = [stage for stage in (1, 2, 3) if _least_bytes(config, config.parallel, stage, world_size) <= memory]
    if not stages:
        return None
    replicas = config.parallel.data_parallel_size(world_size)
    for size in _micro_batches(config, replicas) or [1]:
        batch = -(-config.training.global_batch_size // (size * replicas)) * size * replicas
        training = dataclasses.replace(config.training, micro_batch_size=size, global_batch_size=batch)
        candidate = dataclasses.replace(config, training=training)
        if candidate.problems(world_size):
            continue
        traced = trace_busiest(candidate, world_size)
        plans = (plan(candidate, json_config.read(f"zero{stage}"), world_size, traced) for stage in stages)
        fitting = next((found for found in plans if found.peak_bytes <= memory), None)
        if fitting is not None:
            return fitting
    return None


def _micro_batches(config: Config, replicas: int) -> list[int]:
    """Sizes that share out the global batch, from the config's own down by halves."""
    training = config.training
    sizes = [training.micro_batch_size >> halved for halved in range(training.micro_batch_size.bit_length())]
    return [size for size in sizes if training.global_batch_size % (size * max(1, replicas)) == 0]


def _layouts(world_size: int) -> list[tuple[int, int]]:
    """Tensor and context parallel sizes."""
    powers = [2**exponent for exponent in range(world_size.bit_length())]
    pairs = [(t, c) for t, c in itertools.product(powers, powers) if t <= NODE and t * c <= world_size]
    return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _least_bytes(config: Config, layout: ParallelConfig, stage: int, world_size: int) -> float:
    """What a rank cannot do without, by parameters alone: cheap, to leave the hopeless out."""
    weight = weight_type(config).itemsize
    data_ranks = world_size // layout.tensor
    whole = weight * (1 if stage < 3 else 1 / data_ranks) + (FP32 + weight if stage == 1 else FP32 / data_ranks)
    return config.model.parameters / layout.tensor * (whole + 3 * FP32 / data_ranks)
