"""A test at the start of a run whose DeepSpeed JSON asks for ``overlap_comm``, which has had races on some machines.

A small model of the run's layout takes a few steps with gradients reduced while they are computed, and the same steps
without. Buckets are small, so that there are many messages to be too late.
"""

import dataclasses
import math
from typing import Any

import torch

from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import Groups
from ecp_scale.planning.narrow import narrow_model
from ecp_scale.training.step import optimizer_step
from ecp_scale.zero import json_config
from ecp_scale.zero.engine import build_engine, set_learning_rate

STEPS = 4
BUCKET = 20_000
"""Elements; a layer of the small model has some more."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative, of gradient norms. Kernels on a GPU add in any order, and a step's rounding is in the next one's norm."""


def check_overlap(config: Config, deepspeed: dict[str, Any], groups: Groups, world_size: int) -> None:
    """Compare gradient norms of both ways, where the JSON asks for overlap; the same on all ranks.

    Raises:
        InputError: with both norms of the first step that differs.
    """
    section = deepspeed.get("zero_optimization", {})
    if not section.get("overlap_comm"):
        return
    small = small_model(config, world_size)
    plain, overlapped = (
        gradient_norms(small, _with_overlap(deepspeed, overlap), groups, world_size) for overlap in (False, True)
    )
    compare_norms(plain, overlapped, TOLERANCE[config.training.precision])


def compare_norms(plain: list[float], overlapped: list[float], tolerance: float) -> None:
    """Refuse norms that differ.

    Raises:
        InputError: with both norms of the first step that differs.
    """
    for step, (expected, found) in enumerate(zip(plain, overlapped, strict=True), start=1):
        if not math.isclose(expected, found, rel_tol=tolerance):
            raise InputError(
                f"zero_optimization.overlap_comm gives wrong gradients here: in step {step} of a test model their norm "
                f"is {found:.6g} with it and {expected:.6g} without; set it to false"
            )


def small_model(config: Config, world_size: int) -> Config:
    """The run's layout, architecture and precision at small sizes, without dropout."""
    width = 32 * config.model.heads
    model = narrow_model(config, 16, 16, layers=3, feed_forward_width=width, vocab_size=512, dropout=0.0)
    batch = 2 * config.parallel.data_parallel_size(world_size)
    training = dataclasses.replace(
        config.training, micro_batch_size=1, global_batch_size=batch, batch_schedule=None, compile=False
    )
    attention = dataclasses.replace(config.attention, backend="auto", document_mask=False, restart_positions=False)
    return dataclasses.replace(config, model=model, training=training, attention=attention)


def gradient_norms(config: Config, deepspeed: dict[str, Any], groups: Groups, world_size: int) -> list[float]:
    """Of some steps on random tokens, which differ between the replicas."""
    engine = build_engine(config, json_config.resolve(deepspeed, config, world_size), groups)
    set_learning_rate(engine, 1e-3)
    generator = torch.Generator().manual_seed(groups.replicas.rank())
    shape = (2, 1, config.model.sequence_length + 1)
    found = []
    for _ in range(STEPS):
        batches = torch.randint(config.model.known_vocab_size, shape, generator=generator)
        found.append(optimizer_step(engine, list(batches), groups, False).gradient_norm)
    engine.destroy()
    return found


def _with_overlap(deepspeed: dict[str, Any], overlap: bool) -> dict[str, Any]:
    section = {**deepspeed["zero_optimization"], "overlap_comm": overlap, "reduce_bucket_size": BUCKET}
    return {**deepspeed, "zero_optimization": section}
