"""segment_attention against the oracle, and the four uses of the one primitive."""

import random

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.attention import KeyValue, SegmentCache, segment_attention
from tests.attention.oracle import segment_attention_oracle


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


def attend(q: Tensor, k: Tensor, v: Tensor, m: int) -> Tensor:
    """Whole-sequence attention."""
    return segment_attention(q, k, v, m)[0]


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_oracle_forward_and_backward(seed: int) -> None:
    inputs, m = random_case(seed)
    out, expected = attend(*inputs, m), segment_attention_oracle(*inputs, m)
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
