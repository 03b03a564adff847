"""segment_attention against the oracle, and the four uses of the one primitive."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.attention import KeyValue, SegmentCache, segment, segment_attention
from ecp_scale.attention.flash import flash_attention
from ecp_scale.config import AttentionBackend
from tests.attention.oracle import random_documents, segment_attention_oracle


def random_case(seed: int) -> tuple[list[Tensor], int]:
    """Random q, k, v in float64 and a segment length; half of the lengths leave a ragged last segment."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 3])
    heads = groups * rng.choice([1, 2])
    m = rng.randint(1, 6)
    n = m * rng.randint(1, 4)
    if seed % 2 and m > 1:
        n += rng.randint(1, m - 1)
    width = rng.choice([2, 4, 6])
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, n, width), (2, groups, n, width), (2, groups, n, width)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes], m


def attend(q: Tensor, k: Tensor, v: Tensor, m: int, backend: AttentionBackend = "auto") -> Tensor:
    """Whole-sequence attention."""
    return segment_attention(q, k, v, m, backend=backend)[0]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
@pytest.mark.parametrize("seed", range(20))
def test_equals_the_oracle_forward_and_backward(seed: int, backend: AttentionBackend) -> None:
    inputs, m = random_case(seed)
    out, expected = attend(*inputs, m, backend), segment_attention_oracle(*inputs, m)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed + 1))
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_cases_include_ragged_ends_and_grouped_heads() -> None:
    cases = [random_case(seed) for seed in range(20)]
    assert sum(inputs[0].shape[2] % m > 0 for inputs, m in cases) >= 5
    assert sum(inputs[0].shape[1] != inputs[1].shape[1] for inputs, m in cases) >= 5


@pytest.mark.parametrize("seed", range(6))
def test_flex_equals_the_oracle(seed: int) -> None:
    # FlexAttention has no backward pass on a CPU.
    inputs, m = random_case(seed)
    q, k, v = (x.detach() for x in inputs)
    left = KeyValue(*(torch.randn_like(k[:, :, :1]).repeat(1, 1, m, 1) for _ in range(2)))
    for neighbour in (None, left):
        got, _ = segment_attention(q, k, v, m, neighbour, backend="flex")
        assert_close(got, segment_attention(q, k, v, m, neighbour, backend="sdpa")[0], rtol=1e-6, atol=1e-6)
    assert_close(attend(q, k, v, m, "flex"), segment_attention_oracle(q, k, v, m), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [{"window": 5}, {"look_back": False, "first_length": 3}, {}], ids=str)
@pytest.mark.parametrize("documents", [None, random_documents(2, 22, seed=4)], ids=["whole", "documents"])
def test_every_backend_computes_every_pattern(kind: dict[str, Any], documents: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 22, 8), (2, 2, 22, 8), (2, 2, 22, 8)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    backends: tuple[AttentionBackend, ...] = ("reference", "sdpa", "flash", "flex", "auto")
    outputs = [segment_attention(q, k, v, 5, **kind, documents=documents, backend=name)[0] for name in backends]
    for out in outputs[1:]:
        assert_close(out, outputs[0], rtol=1e-6, atol=1e-6)


def test_flash_is_chosen_for_training_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(segment, "flash_attention", lambda *arguments: calls.append(1) or flash_attention(*arguments))
    q = torch.randn(1, 2, 12, 4)
    for left in (None, KeyValue(q[:, :, :4], q[:, :, :4])):
        segment_attention(q, q, q, 4, left)
        segment_attention(q[:, :, :-1], q[:, :, :-1], q[:, :, :-1], 4, left)
    assert len(calls) == 6  # the first segment waits for its neighbour, and is a call by itself
    segment_attention(q, q, q, 4, dropout=0.1)
    segment_attention(q, q, q, 4, backend="sdpa")
    segment_attention(q[:, :, -1:], q, q, 4)
    assert len(calls) == 6


@pytest.mark.parametrize("seed", range(20))
def test_flash_in_bf16_is_as_near_to_float64_as_bf16_is(seed: int) -> None:
    """The bound: a few roundings of 2^-8 on numbers of about 1; the gradients sum over up to 2m of them."""
    inputs, m = random_case(seed)
    exact = attend(*inputs, m, "sdpa")
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs]
    got = attend(*rounded, m, "flash")
    assert_close(got.double(), exact, rtol=0, atol=0.04)
    wanted = torch.autograd.grad(exact.sum(), inputs)
    for found, expected in zip(torch.autograd.grad(got.sum(), rounded), wanted, strict=True):
        assert_close(found.double(), expected, rtol=0.05, atol=0.05)


def test_tied_keys_and_values_are_one_tensor_throughout() -> None:
    (q, k, _), m = random_case(3)
    out, right = segment_attention(q, k, k, m)
    assert right[0] is right[1]
    assert_close(out, segment_attention_oracle(q, k, k, m))


@pytest.mark.parametrize("seed", range(20))
def test_chunks_with_left_and_right_equal_the_whole(seed: int) -> None:
    inputs, m = random_case(seed)
    q, k, v = inputs
    whole = attend(q, k, v, m)
    outputs, left = [], None
    for start in range(0, q.shape[2], 2 * m):
        chunk = [x[:, :, start : start + 2 * m] for x in (q, k, v)]
        out, left = segment_attention(*chunk, m, left)
        outputs.append(out)
    joined = torch.cat(outputs, dim=2)
    assert_close(joined, whole, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(joined.square().sum(), inputs),
        torch.autograd.grad(whole.square().sum(), inputs),
        strict=True,
    ):
        assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", range(20))
def test_a_cache_fed_with_chunks_of_any_length_equals_the_whole(seed: int) -> None:
    (q, k, v), m = random_case(seed)
    cache = SegmentCache(m)
    rng = random.Random(seed)
    outputs, start = [], 0
    while start < q.shape[2]:
        stop = min(q.shape[2], start + rng.randint(1, 2 * m + 1))
        outputs.append(cache.attend(q[:, :, start:stop], KeyValue(k[:, :, start:stop], v[:, :, start:stop])))
        assert cache.positions <= 2 * m
        start = stop
    assert_close(torch.cat(outputs, dim=2), attend(q, k, v, m), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_later_token_changes_nothing_before_it_to_the_bit(dtype: torch.dtype) -> None:
    (q, k, v), m = random_case(7)
    q, k, v = (x.detach().to(dtype) for x in (q, k, v))
    before = attend(q, k, v, m)
    for t in range(q.shape[2]):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 3.0
        after = attend(*changed, m)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t], before[:, :, t])


def test_no_scores_of_the_whole_sequence_are_ever_made() -> None:
    m, n, width = 16, 1024, 8
    q = torch.randn(1, 1, n, width, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attend(q, q, q, m).sum().backward()
    assert max(sizes) <= max(n * width, 2 * m * m)


def test_dropout_acts_on_the_attention_weights() -> None:
    (q, k, v), m = random_case(5)
    kept = segment_attention(q, k, v, m, dropout=0.0)[0]
    torch.manual_seed(1)
    dropped = segment_attention(q, k, v, m, dropout=0.5)[0]
    assert not torch.allclose(kept, dropped)


@pytest.mark.parametrize(
    ("shapes", "m", "left", "message"),
    [
        ([(1, 2, 4, 2), (1, 2, 4, 2), (1, 2, 3, 2)], 2, None, "differ in shape"),
        ([(1, 3, 4, 2), (1, 2, 4, 2), (1, 2, 4, 2)], 2, None, "do not fit keys"),
        ([(1, 2, 5, 2), (1, 2, 4, 2), (1, 2, 4, 2)], 2, None, "5 queries over 4 keys"),
        ([(1, 2, 4, 2), (1, 2, 4, 2), (1, 2, 4, 2)], 0, None, "at least 1"),
        ([(1, 2, 4, 2), (1, 2, 4, 2), (1, 2, 4, 2)], 2, (1, 2, 1, 2), "expected one full segment"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    shapes: list[tuple[int, ...]], m: int, left: tuple[int, ...] | None, message: str
) -> None:
    neighbour = None if left is None else KeyValue(torch.zeros(left), torch.zeros(left))
    with pytest.raises(ValueError, match=message):
        segment_attention(*(torch.zeros(shape) for shape in shapes), m, neighbour)
