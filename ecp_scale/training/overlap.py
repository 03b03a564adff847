"""A test at the start of a run whose DeepSpeed JSON asks for ``overlap_comm``, which has had races on some machines.

A small model of the run's layout takes a few steps with gradients reduced while they are computed, and the same steps
without. Buckets are small, so that there are many messages to be too late. Steps are those of SGD, in which a part of a
gradient that is missing is a part of the update; a norm would hide it among the others.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import Groups
from ecp_scale.planning.narrow import narrow_model
from ecp_scale.training.step import optimizer_step
from ecp_scale.zero import json_config
from ecp_scale.zero.averaging import stored_weights
from ecp_scale.zero.engine import Engine, build_engine, set_learning_rate

STEPS = 4
LEARNING_RATE = 0.1
BUCKET = 20_000
"""Elements; a layer of the small model has some more."""
RUN = 1024
"""Elements that are compared as one; a bucket has many such runs."""
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Of the update of a run of weights. Kernels on a GPU add in any order, and a step's rounding is in the next one."""


def check_overlap(config: Config, deepspeed: dict[str, Any], groups: Groups, world_size: int) -> None:
    """Compare the updates of this rank's part of the weights in both ways, where the JSON asks for overlap.

    Raises:
        InputError: on a rank whose part differs.
    """
    section = deepspeed.get("zero_optimization", {})
    if not section.get("overlap_comm") or not section.get("stage"):
        return
    small = small_model(config, world_size)
    plain, overlapped = (
        updates(small, _with_overlap(deepspeed, overlap), groups, world_size) for overlap in (False, True)
    )
    compare(plain, overlapped, TOLERANCE[config.training.precision])


def compare(plain: Tensor, overlapped: Tensor, tolerance: float) -> None:
    """Refuse updates that differ.

    Args:
        plain: of all weights, without overlap: (steps, weights).
        overlapped: the same with it.
        tolerance: of what a run of weights has, or a hundredth of the usual where it has less.

    Raises:
        InputError: with the largest difference.
    """
    expected, apart = (
        pad(x, (0, -x.shape[1] % RUN)).unflatten(1, (-1, RUN)).norm(dim=2) for x in (plain, overlapped - plain)
    )
    # A rank may have nothing but rows of the embedding that no token of the test has.
    usual = torch.maximum(expected, 0.01 * expected.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    share = (apart / usual).max().item()
    if not share <= tolerance:
        raise InputError(
            f"zero_optimization.overlap_comm gives wrong gradients here: in the first {STEPS} steps of a test model, "
            f"an update of weights differs by {share:.0%} from that without; set it to false"
        )


def small_model(config: Config, world_size: int) -> Config:
    """The run's layout, architecture and precision at small sizes, without dropout."""
    width = 32 * config.model.heads
    model = narrow_model(config, 16, 16, layers=3, feed_forward_width=width, vocab_size=512, dropout=0.0)
    batch = 2 * config.parallel.data_parallel_size(world_size)
    training = dataclasses.replace(
        config.training, micro_batch_size=1, global_batch_size=batch, batch_schedule=None, compile=False
    )
    # The backend adds in one order on a GPU, too.
    attention = dataclasses.replace(config.attention, backend="reference", document_mask=False, restart_positions=False)
    optimizer = dataclasses.replace(config.optimizer, name="sgd", average_decay=None)
    return dataclasses.replace(config, model=model, training=training, attention=attention, optimizer=optimizer)


def updates(config: Config, deepspeed: dict[str, Any], groups: Groups, world_size: int) -> Tensor:
    """What each step on random tokens, which differ between the replicas, adds to this rank's fp32 weights.

    Returns:
        (steps, weights).
    """
    engine = build_engine(config, json_config.resolve(deepspeed, config, world_size), groups)
    set_learning_rate(engine, LEARNING_RATE)
    found = [flat_weights(engine)]
    generator = torch.Generator().manual_seed(groups.replicas.rank())
    shape = (2, 1, config.model.sequence_length + 1)
    for _ in range(STEPS):
        batches = torch.randint(config.model.known_vocab_size, shape, generator=generator)
        optimizer_step(engine, list(batches), groups)
        found.append(flat_weights(engine))
    engine.destroy()
    return torch.stack(found).diff(dim=0)


def flat_weights(engine: Engine) -> Tensor:
    """A copy of this rank's fp32 weights."""
    return torch.cat([weights.detach().flatten() for weights in stored_weights(engine)])


def _with_overlap(deepspeed: dict[str, Any], overlap: bool) -> dict[str, Any]:
    section = {**deepspeed["zero_optimization"], "overlap_comm": overlap, "reduce_bucket_size": BUCKET}
    return {**deepspeed, "zero_optimization": section}
