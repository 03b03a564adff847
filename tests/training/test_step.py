"""What is decayed, and what a run does when its numbers stop being numbers."""

import pytest
import torch

from ecp_scale.data.marks import LossMask, marked, plain
from ecp_scale.models.parameter_groups import optimizer_groups
from ecp_scale.parallel.groups import Groups
from ecp_scale.training.step import DivergedError, optimizer_step
from ecp_scale.training.validation import mean_loss
from tests.models.settings import BOTH, NAMES, SCALED, build, random_tokens


@pytest.mark.parametrize("config", BOTH, ids=NAMES)
def test_weights_of_linear_layers_decay_and_nothing_else(config: object, groups: Groups) -> None:
    model = build(config, groups)
    decayed, rest = optimizer_groups(model)
    assert {*decayed.parameters, *rest.parameters} == dict(model.named_parameters()).keys()
    assert (decayed.decays, rest.decays) == (True, False)
    assert all(name.endswith("weight") and value.dim() == 2 for name, value in decayed.parameters.items())
    assert all("norm" in name or "bias" in name or "embedding" in name for name in rest.parameters)
    matrices, output, others = optimizer_groups(model, "muon")
    assert [*matrices.parameters, *output.parameters] == [*decayed.parameters]
    assert (list(output.parameters), others) == (["output.weight"], rest)
    assert (matrices.orthogonal, output.orthogonal, others.orthogonal) == (True, False, False)


class FakeEngine:
    """The part of a DeepSpeed engine that a step touches, with losses that a test chooses."""

    skipped_steps = 0
    under_zero = False
    """Whether the norm is known after the update alone, as under ZeRO 1 to 3."""

    def __init__(self, model: torch.nn.Module, factor: float, micro_batches: int = 1) -> None:
        self.module = model
        self.factor = factor
        self.micro_batches = micro_batches
        self.steps = 0

    def __call__(self, *arguments: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total, losses = self.module(*arguments, **named)
        return total * self.factor, losses

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed takes the mean over the micro-batches.
        (loss / self.micro_batches).backward()

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()

    def step(self) -> None:
        self.steps += 1

    def zero_optimization(self) -> bool:
        return self.under_zero

    def bfloat16_enabled(self) -> bool:
        return False


@pytest.mark.parametrize("under_zero", [False, True])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_the_weights_are_not_updated_with_a_loss_that_is_not_finite(
    factor: float, under_zero: bool, groups: Groups
) -> None:
    engine = FakeEngine(build(SCALED, groups, torch.float32), factor)
    engine.under_zero = under_zero
    with pytest.raises(DivergedError, match=r"the loss is .* have not been updated"):
        optimizer_step(engine, [random_tokens(SCALED, 33)], groups)
    assert engine.steps == 0


def test_gradients_that_are_not_finite_are_found_before_the_update(groups: Groups) -> None:
    engine = FakeEngine(build(SCALED, groups, torch.float32), 1.0)
    engine.module.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergedError, match="gradient norm"):
        optimizer_step(engine, [random_tokens(SCALED, 33)], groups)
    assert engine.steps == 0


def test_the_loss_is_the_mean_over_micro_batches(groups: Groups) -> None:
    model = build(SCALED, groups, torch.float32)
    tokens = random_tokens(SCALED, 33, batch=4)
    together = optimizer_step(FakeEngine(model, 1.0), [tokens], groups, stop_requested=lambda: True)
    numbers = [3, 2**40 + 1]
    apart = optimizer_step(FakeEngine(model, 1.0), list(tokens.split(1)), groups, to_sum=numbers)
    assert (together.sums, apart.sums) == ((), tuple(numbers))
    assert apart.loss == pytest.approx(together.loss, rel=1e-6)
    assert (together.stop_requested, apart.stop_requested) == (True, False)


def test_untrained_targets_have_no_loss_however_they_fall_on_the_micro_batches(groups: Groups) -> None:
    model = build(SCALED, groups, torch.float32)
    tokens = random_tokens(SCALED, 33, batch=4)
    tokens[0, 5:30] = 7
    logits = model.logits(tokens[:, :-1]).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
    trained = (tokens[:, 1:] != 7) & (tokens[:, 1:] != 11)
    assert trained.float().mean(dim=1).min() < 0.3 < trained.float().mean()
    expected = losses[trained].mean()
    model.zero_grad()
    expected.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    for batches in ([tokens], list(tokens.split(1))):
        model.zero_grad()
        engine = FakeEngine(model, 1.0, micro_batches=len(batches))
        result = optimizer_step(engine, batches, groups, LossMask((7, 11)))
        assert result.loss == pytest.approx(expected.item(), rel=1e-6)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    rows = [(tokens[:2], 2), (tokens[2:], 1)]
    mask = LossMask((7, 11))
    assert mean_loss(engine, rows, groups, mask) == pytest.approx(losses[:3][trained[:3]].mean().item(), rel=1e-6)


def test_marked_targets_are_read_and_have_no_loss(groups: Groups) -> None:
    model = build(SCALED, groups, torch.float32)
    tokens = random_tokens(SCALED, 33, batch=4)
    with_loss = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    marks = torch.where(with_loss, tokens, marked(tokens))
    assert torch.equal(plain(marks), tokens)
    logits = model.logits(tokens[:, :-1]).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
    trained = with_loss[:, 1:] & (tokens[:, 1:] != 7)
    mask = LossMask((7,), marks=True)
    for batches in ([marks], list(marks.split(1))):
        engine = FakeEngine(model, 1.0, micro_batches=len(batches))
        result = optimizer_step(engine, batches, groups, mask)
        assert result.loss == pytest.approx(losses[trained].mean().item(), rel=1e-6)
    assert mean_loss(engine, [(marks, 2)], groups, mask) == pytest.approx(
        losses[:2][trained[:2]].mean().item(), rel=1e-6
    )
