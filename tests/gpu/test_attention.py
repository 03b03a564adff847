"""Kernels in the type and at the sizes in which they train, against float64 on the CPU."""

import pytest
import torch

from ecp_scale.attention import KeyValue, attend, segment_attention
from ecp_scale.config import AttentionBackend
from tests.attention.oracle import random_documents
from tests.attention.test_devices import CASES, Case, attended_and_gradients, check_near_float64

SEGMENT = 128


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("flash", torch.bfloat16),
        ("sdpa", torch.bfloat16),
        ("flex", torch.bfloat16),
        ("auto", torch.float32),
    ],
    ids=str,
)
def test_every_kernel_is_near_float64(backend: AttentionBackend, dtype: torch.dtype, width: int, case: str) -> None:
    check_near_float64("cuda", backend, CASES[case], dtype, width)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [8, 24, 40, 72, 256])
def test_flash_takes_heads_of_every_width_that_it_says(width: int, batch: int) -> None:
    check_near_float64("cuda", "flash", Case(positions=3 * SEGMENT, batch=batch), torch.bfloat16, width)


def test_flash_takes_a_million_positions_in_memory_linear_in_their_number() -> None:
    peaks = []
    for positions in (65_536, 1_048_576):
        shape = (1, positions, 2, 64)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.cuda.reset_peak_memory_stats()
        out, _ = segment_attention(*leaves, 512, backend="flash")
        torch.autograd.grad(out.sum(), leaves)
        peaks.append(torch.cuda.max_memory_allocated())
        del q, k, v, leaves, out
    assert peaks[1] < 16.5 * peaks[0]


def test_masks_of_many_shapes_in_one_process_give_right_gradients() -> None:
    # cuDNN keeps plans by shape, and took one for another.
    for number, (batch, queries, keys) in enumerate([(2, 256, 512), (1, 256, 512), (2, 100, 356), (2, 256, 512)] * 2):
        generator = torch.Generator().manual_seed(number)
        shapes = [(batch, 4, queries, 32), *[(batch, 2, keys, 32)] * 2]
        leaves = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
        documents = random_documents(batch, keys, seed=number)
        found = {}
        for device, kind in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
            q, k, v = (x.to(device, kind) for x in leaves)
            out = attend(q, KeyValue(k, v, documents.to(device)), causal=number % 2 == 0)
            found[device] = torch.autograd.grad(out.double().square().sum(), leaves)
        for got, wanted in zip(found["cuda"], found["cpu"], strict=True):
            assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dropout", [0.05, 0.3])
@pytest.mark.parametrize("with_documents", [False, True], ids=["whole", "documents"])
def test_dropout_drops_as_many_weights_as_it_says(dropout: float, with_documents: bool) -> None:
    # With values of 1 an attended value is the sum of the weights that are kept: 1 in the mean.
    positions = 64 * SEGMENT
    documents = random_documents(1, positions, seed=3) if with_documents else None
    q, k = (torch.zeros(1, 8, positions, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.ones_like(k)
    out, _ = segment_attention(q, k, v, SEGMENT, documents=documents, dropout=dropout)
    assert abs(out.double().mean().item() - 1) < 0.005
    if documents is not None:
        return
    # The last of a segment sees 256 keys of weight 1/256, each kept with probability 1 - p and divided by it.
    last = out[:, :, 2 * SEGMENT - 1 :: SEGMENT, 0].double()
    expected = (dropout / (1 - dropout) / 256) ** 0.5
    assert abs(last.std().item() / expected - 1) < 0.15


def test_the_same_random_state_drops_the_same_weights() -> None:
    inputs = [torch.randn(1, 2, 4 * SEGMENT, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    found = []
    for _ in range(2):
        torch.cuda.manual_seed(7)
        found.append(segment_attention(*inputs, SEGMENT, dropout=0.2)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[0], segment_attention(*inputs, SEGMENT, dropout=0.2)[0])


def test_flex_is_not_compiled_again_for_new_lengths() -> None:
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for positions in (300, 650, 513, 1024, 896, 2048, 1111, 3000, 2999, 4096, 700, 5000):
        inputs = [torch.randn(1, 2, positions, 32, device="cuda") for _ in range(3)]
        attended_and_gradients(inputs, None, None, "flex")
        graphs.append(counters["unique_graphs"])
    assert graphs[-1] == graphs[2]
