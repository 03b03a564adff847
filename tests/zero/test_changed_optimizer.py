"""An optimizer config that a resume changes holds under every ZeRO stage and precision, as if it had been so before."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ecp_scale.command_line import parse
from ecp_scale.config import Config, OptimizerConfig
from ecp_scale.parallel.groups import Groups
from ecp_scale.training.step import optimizer_step
from ecp_scale.zero import json_config
from ecp_scale.zero.engine import apply_optimizer_config, build_engine
from tests.parallel.layouts import RECIPE, SETTINGS

CHANGES: dict[str, Any] = {"beta1": 0.5, "beta2": 0.6, "epsilon": 1e-3, "weight_decay": 0.9, "gradient_clipping": 0.01}
SCHEDULES: list[dict[str, Any]] = [
    {"min_lr_ratio": 0.5},
    {"decay_tokens": 2000},
    {"schedule": "halving", "halving_tokens": 500},
    {"schedule": "halving", "halving_tokens": 2000},
]


def config_of(precision: str, optimizer: str = "adamw") -> Config:
    settings = {**SETTINGS["scaled"], **RECIPE, "training.precision": precision, "model.vocab_size": 64}
    settings["optimizer.name"] = optimizer
    words = [f"--{key}={value}" for key, value in settings.items()]
    return parse([*words, "--dry-run"], "").config


def weights_after(
    config: Config, stage: int, groups: Groups, loaded: OptimizerConfig | None = None
) -> Iterator[Tensor]:
    """The fp32 weights after two steps; ``loaded`` are the numbers that a checkpoint brings into the new engine."""
    from deepspeed.utils import safe_get_full_fp32_param

    tokens = torch.randint(64, (4, config.model.sequence_length + 1), generator=torch.Generator().manual_seed(1))
    content = {"zero_optimization": {"stage": stage}}
    engine = build_engine(config, json_config.resolve(content, config, 1), groups)
    for numbers in (loaded, config.optimizer) if loaded is not None else ():
        apply_optimizer_config(engine, numbers)
    for _ in range(2):
        optimizer_step(engine, tokens.split(1), groups)
    for parameter in engine.module.parameters():
        full = safe_get_full_fp32_param(parameter) if stage else parameter
        yield full.detach().clone()
    engine.destroy()


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_the_numbers_of_the_optimizer_may_change(stage: int, precision: str, groups: Groups) -> None:
    config = config_of(precision)
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **CHANGES))
    changed = list(weights_after(other, stage, groups, loaded=config.optimizer))
    expected = list(weights_after(other, stage, groups))
    unchanged = list(weights_after(config, stage, groups))
    assert all(map(torch.equal, changed, expected))
    assert not all(map(torch.equal, changed, unchanged))


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
def test_the_momentum_of_muon_may_change(stage: int, precision: str, groups: Groups) -> None:
    config = config_of(precision, "muon")
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, momentum=0.5))
    changed = list(weights_after(other, stage, groups, loaded=config.optimizer))
    assert all(map(torch.equal, changed, weights_after(other, stage, groups)))
    assert not all(map(torch.equal, changed, weights_after(config, stage, groups)))
    if precision == "fp32":  # every stage, to rounding
        for found, expected in zip(changed, weights_after(other, 0, groups), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", SCHEDULES, ids=str)
def test_every_field_of_the_schedule_changes_the_rate(change: dict[str, Any]) -> None:
    optimizer = config_of("fp32").optimizer
    start = dataclasses.replace(optimizer, halving_tokens=1000, **{k: v for k, v in change.items() if k == "schedule"})
    rates = [dataclasses.replace(start, **fields).learning_rate_at(1800, 4000) for fields in ({}, change)]
    assert rates[0] != rates[1]
