"""DeepSpeed's optimizers with fewer kernels and waits take the steps that they take with their own."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def engine_of(settings: Config, groups: Groups, stage: int) -> engines.Engine:
    """The model under a stage of ZeRO."""
    return engines.build_engine(
        settings, json_config.resolve({"zero_optimization": {"stage": stage}}, settings, 1), groups
    )


def trained(settings: Config, groups: Groups, poisoned: bool) -> tuple[list[float], list[Tensor], int]:
    """Norms of three steps, the weights after them, and how many steps were left out."""
    engine = engine_of(settings, groups, 1)
    batches = [random_tokens(SCALED, SCALED.sequence_length + 1) for _ in range(2)]
    norms = []
    for _ in range(3):
        norms.append(optimizer_step(engine, batches, groups).gradient_norm)
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


class Waits(TorchDispatchMode):
    """Counts numbers that are read off the device: off tensors that are not made of the host's numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.of_host: dict[int, Any] = {}
        """Their memory by its address, held so that the address stays theirs."""
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        inputs, outputs = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        memory = [x.untyped_storage() for x in inputs]
        is_host = name == "aten::lift_fresh" or (bool(memory) and all(x.data_ptr() in self.of_host for x in memory))
        if name == "aten::_local_scalar_dense":
            self.count += not is_host
        elif is_host and not name.startswith("c10d"):
            self.of_host |= {x.untyped_storage().data_ptr(): x for x in outputs}
        else:  # writes of the device's to where the host had its own
            written = memory if name.startswith("c10d") else [x.untyped_storage() for x in outputs]
            for x in written:
                self.of_host.pop(x.data_ptr(), None)
        return out


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_waits_for_its_norm_once(stage: int, groups: Groups) -> None:
    engine = engine_of(config(0.05), groups, stage)
    batches = [random_tokens(SCALED, SCALED.sequence_length + 1) for _ in range(2)]
    optimizer_step(engine, batches, groups)
    with Waits() as waits:
        result = optimizer_step(engine, batches, groups)
    engine.destroy()
    assert result.gradient_norm > 0.05  # and is clipped
    assert waits.count == 1  # for the norm; the loss is read by tolist(), which no mode sees
