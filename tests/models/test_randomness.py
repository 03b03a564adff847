"""Dropout: the same numbers in a recomputed pass, others on other ranks, and right gradients with either."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ecp_scale.config import ModelConfig, ParallelConfig
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.random import seed_step
from ecp_scale.parallel.recompute import PASS, recomputed
from tests.launching import run_successfully
from tests.models.settings import BOTH, NAMES, random_tokens, variant

MODES = ("none", "selective", "full")


def trainer(config: ModelConfig, groups: Groups, recompute: str) -> LanguageModel:
    """A model that drops, in training mode and float64."""
    parallel = ParallelContext(groups.tensor, torch.float64, recompute=cast(Any, recompute))
    model = LanguageModel(config, parallel)
    initialize(model, config, parallel, seed=1)
    return model.train()


def loss(model: LanguageModel, groups: Groups, step: int = 5) -> torch.Tensor:
    """A loss whose masks are those of ``step``."""
    seed_step(1, step, groups)
    tokens = random_tokens(model.config, model.config.sequence_length + 1)
    return model(tokens[:, :-1], tokens[:, 1:])[0]


@pytest.mark.parametrize("config", BOTH, ids=NAMES)
@pytest.mark.parametrize("architecture", ["ecp", "split_attention"])
@pytest.mark.parametrize("recompute", MODES)
def test_gradients_with_dropout_are_finite_differences_however_they_are_computed(
    config: ModelConfig, architecture: str, recompute: str, groups: Groups
) -> None:
    model = trainer(variant(config, architecture, dropout=0.3), groups, recompute)
    total = loss(model, groups)
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in model.parameters()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=sign * 1e-6)
            values.append(loss(model, groups).item())
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.sub_(direction, alpha=sign * 1e-6)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    assert loss(model, groups).item() == pytest.approx(total.item(), rel=1e-9)
    assert loss(model, groups, step=6).item() != pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_two_forward_passes_before_their_backward_passes_keep_their_masks(recompute: str, groups: Groups) -> None:
    config = variant(BOTH[1], "ecp", dropout=0.3)
    expected, found = [], []
    for mode, gradients in (("none", expected), (recompute, found)):
        model = trainer(config, groups, mode)
        first, second = loss(model, groups, 1), loss(model, groups, 2)
        for total in (first, second):  # the older one first, as no stack of kept numbers would have it
            gradients.append(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))
    for one, other in zip(expected, found, strict=True):
        for wanted, got in zip(one, other, strict=True):
            if wanted is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_what_a_pass_received_is_kept_for_that_call_alone() -> None:
    sent = iter(range(1, 100))

    def function(x: torch.Tensor) -> torch.Tensor:
        this = PASS.get()
        if this.which == "again":
            message = this.received.popleft()
        else:
            message = torch.tensor(float(next(sent)))
            this.received.append(message)
        return (x * message).sin()

    inputs = [torch.tensor(0.1, requires_grad=True) for _ in range(2)]
    outputs = [recomputed(function, x, random=False) for x in inputs]
    for number, (x, output) in enumerate(zip(inputs, outputs, strict=True), start=1):
        output.backward()
        assert x.grad is not None
        assert float(x.grad) == pytest.approx(number * float(torch.tensor(0.1 * number).cos()))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"context": 2}, {}], ids=["tensor", "context", "replicas"])
def test_no_two_ranks_drop_the_same(layout: dict[str, int], tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"masks": layout}]))
    assert ParallelConfig(**layout).tensor in (1, 2)
    run_successfully("tests/parallel/share_sequences.py", jobs, ranks=2)
