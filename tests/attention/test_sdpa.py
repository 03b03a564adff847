"""Windows, documents, groups and latents against a dense masked oracle, and through caches."""

import random

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.attention import KeyValue, SegmentCache, attend, latent_attention, segment_attention
from tests.attention.oracle import dense_attention, random_documents, same_document

N = 23


def tensors(seed: int, queries: int = N, keys: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """q (2, 4, queries, 6) and k, v (2, 2, keys, 6) in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, queries, 6), (2, 2, keys, 6), (2, 2, keys, 6)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def check(got: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Equal forward and backward."""
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(5))
    gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (got, expected))
    for ours, wanted in zip(*gradients, strict=True):
        assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


def distance(queries: int = N, keys: int = N) -> Tensor:
    """How far (Nq, Nk) each key lies behind its query, the queries being the last positions."""
    return torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]


@pytest.mark.parametrize("queries", [1, 2, 7, N])
@pytest.mark.parametrize("window", [None, 1, 5, N, 2 * N])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_sees_the_past_in_its_window_and_document(queries: int, window: int | None, masked: bool) -> None:
    q, k, v = inputs = tensors(queries, queries)
    behind = distance(queries)
    visible = (behind >= 0) & (behind < (window or N))
    documents = None
    if masked:
        documents = random_documents(2, N, queries)
        visible = visible & same_document(documents)[:, :, N - queries :]
    check(attend(q, KeyValue(k, v, documents), window=window), dense_attention(*inputs, visible), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_both_directions_sees_all_of_its_document(masked: bool) -> None:
    q, k, v = inputs = tensors(1)
    documents = random_documents(2, N, 1) if masked else None
    visible = torch.ones(N, N, dtype=torch.bool) if documents is None else same_document(documents)
    check(attend(q, KeyValue(k, v, documents), causal=False), dense_attention(*inputs, visible), inputs)


@pytest.mark.parametrize("window", [1, 3, 4, 8, 22, 23, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_segments_of_a_window_are_a_sliding_window(window: int, masked: bool) -> None:
    inputs = tensors(window)
    documents = random_documents(2, N, window) if masked else None
    visible = (distance() >= 0) & (distance() < window)
    if documents is not None:
        visible = visible & same_document(documents)
    got, _ = segment_attention(*inputs, window, window=window, documents=documents)
    check(got, dense_attention(*inputs, visible), inputs)


@pytest.mark.parametrize(("group", "first"), [(4, None), (4, 2), (6, 3), (30, 15), (60, 30)])
def test_segments_that_do_not_look_back_are_groups(group: int, first: int | None) -> None:
    inputs = tensors(group)
    numbers = (torch.arange(N) + group - (first or group)) // group
    visible = (distance() >= 0) & (numbers[:, None] == numbers[None, :])
    got, _ = segment_attention(*inputs, group, look_back=False, first_length=first)
    check(got, dense_attention(*inputs, visible), inputs)


@pytest.mark.parametrize("segment", [None, 1, 4, 15])
@pytest.mark.parametrize("latents", [1, 8, N])
@pytest.mark.parametrize("masked", [False, True])
def test_latents_see_everything_and_the_context_itself(segment: int | None, latents: int, masked: bool) -> None:
    q, k, v = inputs = tensors(latents)
    documents = random_documents(2, N, latents) if masked else None
    context = torch.arange(N) < N - latents
    number = torch.arange(N) // (segment or N)
    visible = torch.where(context[:, None], context[None, :] & (number[:, None] == number[None, :]), distance() >= 0)
    if documents is not None:
        visible = visible & same_document(documents)
    got = latent_attention(q, KeyValue(k, v, documents), latents, segment)
    check(got, dense_attention(*inputs, visible), inputs)


def test_dropout_of_the_context_is_its_own() -> None:
    q, k, v = tensors(2)
    whole = latent_attention(q, KeyValue(k, v), 8)
    torch.manual_seed(1)
    dropped = latent_attention(q, KeyValue(k, v), 8, dropout=0.5)
    assert torch.equal(dropped[:, :, :-8], whole[:, :, :-8])
    assert not torch.allclose(dropped[:, :, -8:], whole[:, :, -8:])


@pytest.mark.parametrize(
    "kind",
    [{}, {"window": 4}, {"window": 2}, {"look_back": False}, {"look_back": False, "first_length": 2}],
    ids=str,
)
@pytest.mark.parametrize("seed", range(6))
def test_every_cache_fed_with_chunks_of_any_length_equals_the_whole(kind: dict[str, int], seed: int) -> None:
    q, k, v = tensors(seed)
    documents = random_documents(2, N, seed) if seed % 2 else None
    cache = SegmentCache(4, **kind)
    rng = random.Random(seed)
    outputs, start = [], 0
    while start < N:
        stop = min(N, start + rng.randint(1, 9))
        part = KeyValue(
            k[:, :, start:stop], v[:, :, start:stop], None if documents is None else documents[:, start:stop]
        )
        outputs.append(cache.attend(q[:, :, start:stop], part))
        assert cache.positions <= 8
        start = stop
    whole, _ = segment_attention(q, k, v, 4, **kind, documents=documents)
    assert_close(torch.cat(outputs, dim=2), whole, rtol=1e-12, atol=1e-12)
