"""The chunked loss against torch's cross-entropy: values, gradients, and what is never in memory."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ecp_scale.models import loss
from ecp_scale.models.loss import OutputLayer
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups
from ecp_scale.precision import as_on_a_gpu

WIDTH, PADDED, KNOWN = 8, 40, 37


def case(groups: Groups, dtype: torch.dtype, bias: bool) -> tuple[OutputLayer, list[torch.Tensor]]:
    """A layer with random weights; x (R, B, D), targets and who counts (R, B)."""
    generator = torch.Generator().manual_seed(3)
    layer = OutputLayer(WIDTH, PADDED, KNOWN, bias, ParallelContext(groups.tensor, dtype))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(11, 2, WIDTH, dtype=dtype, generator=generator)
    targets = torch.randint(0, KNOWN, (11, 2), generator=generator)
    trained = torch.rand(11, 2, generator=generator) < 0.7
    return layer, [x, targets, trained]


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows_at_a_time", [1, 3, 22, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_equals_cross_entropy(
    groups: Groups,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    rows_at_a_time: int,
    bias: bool,
    compiled: bool,
    z_loss: float,
) -> None:
    # What would be compiled is held to the same, uncompiled.
    monkeypatch.setattr(loss, "maybe_compile", lambda function, compiled: function)
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", rows_at_a_time * PADDED)
    layer, (x, targets, trained) = case(groups, dtype, bias)
    layer.compiled, layer.z_loss = compiled, z_loss
    inputs = [x.requires_grad_(), *layer.parameters()]
    total, losses = layer(x, targets, trained)
    found = torch.autograd.grad(total * 0.5, inputs)

    exact = [value.detach().double().requires_grad_() for value in inputs]
    scores = torch.nn.functional.linear(*exact)[..., :KNOWN]
    expected = cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(11, 2)
    trained_on = (expected + z_loss * scores.logsumexp(-1) ** 2)[trained].sum()
    wanted = torch.autograd.grad(0.5 * trained_on, exact)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert not losses.requires_grad
    for got, true in zip((losses, total, *found), (expected, trained_on.detach(), *wanted), strict=True):
        assert_close(got.double(), true, rtol=tolerance, atol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [item for item in torch.utils._pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in found)])
        return result


def test_the_scores_of_all_positions_never_exist(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 3 * PADDED)
    layer, (x, targets, trained) = case(groups, torch.float32, False)
    with LargestTensor() as largest:
        layer(x.requires_grad_(), targets, trained)[0].backward()
    assert largest.elements == max(PADDED * WIDTH, x.numel()) < targets.numel() * PADDED


def test_without_gradients_none_are_computed(groups: Groups) -> None:
    layer, (x, targets, _) = case(groups, torch.float32, True)
    with torch.no_grad():
        total, losses = layer(x, targets)
    assert not total.requires_grad
    assert total == pytest.approx(losses.sum().item())


def test_the_factor_of_the_loss_is_not_rounded_to_bf16(groups: Groups) -> None:
    layer, (x, targets, trained) = case(groups, torch.bfloat16, bias=True)
    inputs = [x.requires_grad_(), *layer.parameters()]
    # A sum of losses is divided by the number of targets, which is seldom a power of two.
    factor = (1.25 + 2**-8) / 1024  # in bf16 smaller by 0.3 %; nearer to 1, it would move all products to one side
    whole = torch.autograd.grad(layer(x, targets, trained)[0], inputs)
    scaled = torch.autograd.grad(layer(x, targets, trained)[0] * factor, inputs)
    for one, other in zip(whole, scaled, strict=True):
        one, other = one.double().flatten(), other.double().flatten()
        assert float(other @ one / (one @ one) / factor) == pytest.approx(1, abs=1e-3)


def test_chunks_are_whole_tiles_and_larger_on_a_gpu() -> None:
    x = torch.zeros(1)
    assert loss.chunk_rows(x, 50_304) == 256
    assert loss.chunk_rows(x, 10**9) == 1
    with as_on_a_gpu():
        assert loss.chunk_rows(x, 50_304) == 5248
