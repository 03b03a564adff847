"""DeepSpeed's optimizer for bf16 with fewer kernels takes the steps that it takes with its own."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ecp_scale.command_line import load_preset
from ecp_scale.config import Config
from ecp_scale.parallel.groups import Groups
from ecp_scale.training.step import optimizer_step
from ecp_scale.zero import engine as engines
from ecp_scale.zero import json_config
from tests.models.settings import SCALED, random_tokens


def config(clipping: float) -> Config:
    """Two micro-batches of a small model under ZeRO-1."""
    preset = load_preset("scaled-125m")
    training = dataclasses.replace(preset.training, micro_batch_size=2, global_batch_size=4)
    optimizer = dataclasses.replace(preset.optimizer, gradient_clipping=clipping, learning_rate=1e-2)
    return dataclasses.replace(preset, model=SCALED, training=training, optimizer=optimizer)


def trained(settings: Config, groups: Groups, poisoned: bool) -> tuple[list[float], list[Tensor], int]:
    """Norms of three steps, the weights after them, and how many steps were left out."""
    engine = engines.build_engine(
        settings, json_config.resolve({"zero_optimization": {"stage": 1}}, settings, 1), groups
    )
    batches = [random_tokens(SCALED, SCALED.sequence_length + 1) for _ in range(2)]
    norms = []
    for _ in range(3):
        norms.append(optimizer_step(engine, batches, groups, False).gradient_norm)
        if poisoned:
            engine.optimizer.fp32_groups_gradients_flat[0][5] = torch.nan  # of the next step
    weights = [parameter.detach().float().clone() for parameter in engine.module.parameters()]
    skipped = engine.skipped_steps
    engine.destroy()
    return norms, weights, skipped


@pytest.mark.parametrize(("clipping", "poisoned"), [(0.05, False), (1e6, False), (1.0, True)])
def test_steps_are_those_of_deepspeed_itself(
    clipping: float, poisoned: bool, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trained(config(clipping), groups, poisoned)
    monkeypatch.setattr(engines, "use_few_kernels", lambda optimizer: None)
    theirs = trained(config(clipping), groups, poisoned)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, nan_ok=True)
    assert ours[2] == theirs[2] == 2 * poisoned
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-4)
