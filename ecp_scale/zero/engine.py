"""The model under DeepSpeed: weights, optimizer, and the gradient norm that every ZeRO stage must agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn

from ecp_scale.config import Config, OptimizerConfig
from ecp_scale.errors import InputError
from ecp_scale.models.initialization import initialize
from ecp_scale.models.parameter_groups import optimizer_groups
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.partition import Partition
from ecp_scale.precision import weight_type
from ecp_scale.zero.averaging import drop_average
from ecp_scale.zero.checkpoint_engine import CheckpointFiles
from ecp_scale.zero.few_kernels import norm_over, use_few_kernels, wait_once_for_norm
from ecp_scale.zero.making import held_weight, make_model
from ecp_scale.zero.mpu import ModelParallelUnit
from ecp_scale.zero.muon import Muon

Engine: TypeAlias = deepspeed.DeepSpeedEngine
"""A model with its optimizer under DeepSpeed."""


def build_engine(config: Config, deepspeed_config: dict[str, Any], groups: Groups, draw: bool = True) -> Engine:
    """Make what this rank holds of the model, and hand it to DeepSpeed.

    Args:
        config: the run, with its vocabulary known.
        deepspeed_config: the DeepSpeed JSON with every "auto" filled in.
        groups: this rank's process groups.
        draw: initialise the weights from the seed; else they are left as they are, for a checkpoint to fill.
    """
    parallel = ParallelContext.of(config, groups, weight_type(config))
    with _local_rank_of(groups.device):
        model = make_model(config, parallel, deepspeed_config, groups.device)
        if draw:
            initialize(model, config.model, parallel, config.training.seed, held_weight)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(model, config.optimizer, groups),
            config=deepspeed_config,
            mpu=ModelParallelUnit(),
        )
    engine.checkpoint_engine = CheckpointFiles(config.checkpoint.asynchronous)
    # It would write scripts of its own beside the checkpoints, where a full disk is an error on the first rank alone.
    engine._copy_recovery_script = lambda folder: None
    if isinstance(engine.optimizer, BF16_Optimizer):
        use_few_kernels(engine.optimizer)
    elif engine.zero_optimization():
        wait_once_for_norm(engine.optimizer)
    engine_reduces = not engine.zero_optimization() or isinstance(engine.optimizer, BF16_Optimizer)
    if groups.data.size() == 1 and engine_reduces:
        # It would copy all gradients there and back, and under ZeRO-1 in bf16 also round what is accumulated in fp32.
        engine.enable_backward_allreduce = False
    return engine


@contextmanager
def _local_rank_of(device: torch.device) -> Iterator[None]:
    """Let LOCAL_RANK be the number of this rank's GPU, as DeepSpeed takes it.

    Under Slurm's --gpus-per-task=1 each task sees a GPU of its own as number 0, whatever its local rank.
    """
    before = os.environ.get("LOCAL_RANK")
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def check_zero_section(deepspeed_config: dict[str, Any]) -> None:
    """Let DeepSpeed read its section before any process group is made.

    Raises:
        InputError: if it holds an unknown key or a value of another type.
    """
    try:
        DeepSpeedZeroConfig(**deepspeed_config.get("zero_optimization", {}))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, item['loc']))} is {item['input']!r}: {item['msg']}" for item in error.errors()]
        raise InputError("\n".join(f"DeepSpeed JSON: zero_optimization.{text}" for text in wrong)) from error


def _optimizer(model: nn.Module, config: OptimizerConfig, ranks: Groups) -> torch.optim.Optimizer:
    groups = optimizer_groups(model, config.name)
    if config.name == "muon":
        return Muon(groups, config, ranks)
    as_torch_takes_them = [
        {"params": list(group.parameters.values()), "weight_decay": config.weight_decay if group.decays else 0.0}
        for group in groups
    ]
    if config.name == "sgd":
        return torch.optim.SGD(as_torch_takes_them, lr=config.learning_rate)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(as_torch_takes_them, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def apply_optimizer_config(engine: Engine, config: OptimizerConfig) -> None:
    """Let the config hold after a checkpoint is loaded, which brings the numbers that were used when it was saved."""
    # In the order of optimizer_groups, under every ZeRO stage.
    ours = optimizer_groups(engine.module, config.name)
    for group, of_ours in zip(engine.optimizer.param_groups, ours, strict=True):
        group["weight_decay"] = config.weight_decay if of_ours.decays else 0.0
        if config.name != "sgd":
            group["betas"], group["eps"] = (config.beta1, config.beta2), config.epsilon
        if config.name == "muon":
            group["momentum"] = config.momentum
    if config.average_decay is None:
        drop_average(engine)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = config.gradient_clipping


def set_batch(engine: Engine, sequences: int) -> None:
    """Let the next optimizer step have as many sequences, counted as DeepSpeed does: over all ranks that hold data."""
    engine.set_train_batch_size(sequences)
    # Trap: DeepSpeed takes the number of all micro-batches so far modulo those of a step for the place in it, and ZeRO
    # keeps a number of its own.
    engine.micro_steps = 0
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = engine.gradient_accumulation_steps()


def set_learning_rate(engine: Engine, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def plain_gradient_norm(engine: Engine, groups: Groups) -> float | None:
    """Global norm of the averaged gradients where DeepSpeed keeps none (ZeRO-0 in fp32), else None.

    A replicated parameter counts once, a sharded one on each of its ranks. Call it between the last backward and step.
    """
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [
        parameter.grad.detach()
        for parameter in engine.module.parameters()
        if parameter.grad is not None and (Partition.of(parameter).partition_dim is not None or groups.tensor_rank == 0)
    ]
    return norm_over(gradients, groups.tensor, groups.device).item()
