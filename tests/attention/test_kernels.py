"""What a GPU would run, without one: plans of calls and of pieces by a stand-in kernel, shapes by fake CUDA."""

import gc
import itertools
import random
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex
from torch.testing import assert_close

from ecp_scale.attention import (
    KeyValue,
    SegmentCache,
    attend,
    flex,
    kernels,
    latent,
    latent_attention,
    pieces,
    sdpa,
    segment,
    segment_attention,
)
from ecp_scale.attention.calls import Pattern, segment_calls
from ecp_scale.attention.flash import _Flash
from ecp_scale.attention.flex import BLOCK, block_mask
from ecp_scale.attention.kernels import CudaKernel, CudnnKernel, Kernel, Lengths, Settings
from ecp_scale.attention.pieces import Pieces, _FlashPieces, document_pieces
from ecp_scale.attention.reference import reference_attention
from ecp_scale.config import TrainingConfig
from tests.attention.oracle import dense_attention, random_documents, same_document
from tests.attention.stand_in import StandIn


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A kernel that takes what FlashAttention takes, chosen wherever a GPU would choose that."""
    kernel = StandIn()
    for module in (segment, sdpa, latent):
        monkeypatch.setattr(module, "kernel_for", lambda *_: kernel)
    monkeypatch.setattr(pieces, "FEWEST_QUERIES", 1)
    return kernel


def cases() -> Iterator[dict[str, Any]]:
    """Patterns with every kind of end, neighbour, window and document that a layer may have."""
    for seed in range(60):
        rng = random.Random(seed)
        m = rng.randint(1, 6)
        n = rng.randint(1, 5 * m)
        look_back = rng.random() < 0.75
        yield {
            "seed": seed,
            "m": m,
            "n": n,
            "queries": n if rng.random() < 0.6 else rng.randint(1, n),
            "batch": rng.randint(1, 3),
            "groups": rng.choice([1, 2]),
            "shared": rng.choice([1, 2]),
            "tied": rng.random() < 0.2,
            "first": None if look_back or rng.random() < 0.2 else max(1, m // 2),
            "look_back": look_back,
            "left": look_back and rng.random() < 0.5,
            "window": rng.choice([None, None, 1, m, m + 1]),
            "documents": rng.random() < 0.5,
        }


def seen_by_definition(case: dict[str, Any], documents: Tensor | None) -> Tensor:
    """Who sees whom of [left, chunk], position by position."""
    before = case["m"] if case["left"] else 0
    first = case["first"] or case["m"]
    position = torch.arange(-before, case["n"])
    number = torch.where(position < 0, -1, torch.where(position < first, 0, 1 + (position - first) // case["m"]))
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0) & (number[:, None] - number[None, :] <= int(case["look_back"]))
    if case["window"] is not None:
        seen = seen & (distance < case["window"])
    seen = seen.expand(case["batch"], 1, -1, -1)
    if documents is not None:
        seen = seen & same_document(documents)
    return seen[:, :, -case["queries"] :]


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case['seed']}")
def test_every_pattern_equals_its_definition_forward_and_backward(case: dict[str, Any], stand_in: StandIn) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    heads, before = case["groups"] * case["shared"], case["m"] if case["left"] else 0

    def tensor(heads: int, positions: int) -> Tensor:
        # Positions outermost in memory, as a linear leaves them.
        rows = torch.randn(positions, case["batch"], heads, 4, dtype=torch.float64, generator=generator)
        return rows.permute(1, 2, 0, 3).requires_grad_()

    q, k = tensor(heads, case["queries"]), tensor(case["groups"], case["n"])
    v = k if case["tied"] else tensor(case["groups"], case["n"])
    left = [tensor(case["groups"], before) for _ in range(2)] if before else []
    documents = random_documents(case["batch"], before + case["n"], case["seed"]) if case["documents"] else None
    out, _ = segment_attention(
        q,
        k,
        v,
        case["m"],
        KeyValue(*left) if left else None,
        look_back=case["look_back"],
        window=case["window"],
        first_length=case["first"],
        documents=documents,
    )
    keys, values = (torch.cat((side, x), dim=2) for side, x in zip(left, (k, v), strict=True)) if left else (k, v)
    expected = dense_attention(q, keys, values, seen_by_definition(case, documents))
    assert_close(out, expected, rtol=1e-12, atol=1e-12)
    inputs = [q, k, *([] if case["tied"] else [v]), *left]
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    pairs = (torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in (out, expected))
    for got, wanted in zip(*pairs, strict=True):
        # A neighbour that no query sees has no gradient.
        if wanted is not None:
            assert_close(torch.zeros_like(wanted) if got is None else got, wanted)
        else:
            assert got is None or not got.any()
    alone = case["n"] <= (case["first"] or case["m"]) and case["queries"] in (1, case["n"])
    assert stand_in.calls > 0 or (alone and not case["left"])


def test_cases_hold_every_kind() -> None:
    found = list(cases())
    for kind in ("left", "documents", "tied", "first", "window"):
        assert sum(bool(case[kind]) for case in found) >= 6, kind
    assert sum(case["queries"] < case["n"] for case in found) >= 10
    assert sum(case["n"] % case["m"] > 0 for case in found) >= 10
    assert any(case["documents"] and case["left"] and case["window"] is not None for case in found)


@pytest.mark.parametrize("segment_length", [None, 1, 4, 15])
@pytest.mark.parametrize("latents", [1, 8, 30])
def test_latents_and_context_with_documents_are_pieces(
    segment_length: int | None, latents: int, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    if latents > 1:  # a single one is a step of generation: a mask of one row
        monkeypatch.setattr(sdpa, "visible", pytest.fail)
    n = 30
    q, k, v = (torch.randn(2, heads, n, 4, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    documents = random_documents(2, n, latents)
    position, context = torch.arange(n), torch.arange(n) < n - latents
    number = position // (segment_length or n)
    own = context[None, :] & (number[:, None] == number[None, :])
    seen = torch.where(context[:, None], own, position[:, None] >= position) & same_document(documents)
    expected = dense_attention(q, k, v, seen)
    got = latent_attention(q, KeyValue(k, v, documents), latents, segment_length)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(got.shape, dtype=torch.float64)
    pairs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (got, expected))
    for found, wanted in zip(*pairs, strict=True):
        assert_close(found, wanted)
    assert stand_in.calls == (latents < n) + (latents > 1)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_latents_over_more_keys_need_no_mask(window: int | None, causal: bool, stand_in: StandIn) -> None:
    q, k = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (7, 19))
    distance = torch.arange(12, 19)[:, None] - torch.arange(19)
    seen = (distance >= 0) | torch.tensor(not causal and window is None)
    seen = seen & (distance < (window or 99)) if window else seen
    got = attend(q, KeyValue(k, k), causal=causal, window=window)
    assert_close(got, dense_attention(q, k, k, seen))
    assert stand_in.calls == (1 if causal or window else 0)


def test_a_layer_is_few_calls_whatever_its_length() -> None:
    for segments, tail in itertools.product((2, 3, 50), (0, 5)):
        n = segments * 8 + tail
        for lower_right in (True, False):
            calls = segment_calls(Pattern(n, n, 8, 8), lower_right)
            assert len(calls) <= (3 if lower_right else 4)
            pairs = sum(call.stretches * call.queries * (call.left + call.own) for call in calls)
            assert pairs <= 2 * 8 * n


def test_a_cache_takes_the_backend_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(segment, "attend", lambda *_, backend, **__: asked.append(backend) or torch.zeros(1, 1, 1, 4))
    x = torch.zeros(1, 1, 1, 4)
    SegmentCache(4, backend="reference").attend(x, KeyValue(x, x))
    assert asked == ["reference"]


def test_grouped_heads_are_kept_from_a_kernel_that_reads_beyond_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 8, 8)
    monkeypatch.setattr(kernels, "GROUPS_ON_CPU", False)
    assert kernels.kernel_for(q, k, Settings(), False) is None
    assert kernels.kernel_for(q, q, Settings(), False) is not None


@pytest.mark.parametrize(
    ("backend", "settings", "documents", "reason"),
    [
        ("flash", Settings(dropout=0.1), False, r"has no dropout \(model.dropout is 0.1\)"),
        ("flash", Settings(window=5), True, r"no documents \(.*\), no windows \("),
        ("flex", Settings(), False, "FlexAttention has no backward pass on a CPU"),
        ("flash", Settings(), False, None),
        ("auto", Settings(window=5, dropout=0.1), True, None),
        ("sdpa", Settings(window=5, dropout=0.1), True, None),
        ("reference", Settings(window=5, dropout=0.1), True, None),
    ],
)
def test_a_backend_that_cannot_serve_says_why(backend: Any, settings: Settings, documents: bool, reason: Any) -> None:
    said = kernels.refusal(backend, torch.zeros(1, 2, 3, 8), settings, documents)
    assert said is None if reason is None else re.search(reason, said)


def test_what_flash_attention_does_not_take_on_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        wide, odd, right, widest = (
            torch.empty(1, 1, 1, width, dtype=dtype, device="cuda")
            for width, dtype in ((64, torch.float32), *((width, torch.bfloat16) for width in (20, 64, 256)))
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "has_flash", lambda device: True)
    assert "found float32 and heads of 64" in (kernels.refusal("flash", wide, Settings(), False) or "")
    assert "found bfloat16 and heads of 20" in (kernels.refusal("flash", odd, Settings(), False) or "")
    assert kernels.refusal("flash", right, Settings(window=3, dropout=0.1), True) is None
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    assert "-3 and -4 have no dropout" in (kernels.refusal("flash", right, Settings(dropout=0.1), False) or "")
    assert kernels.refusal("flash", right, Settings(window=3), True) is None
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert "to 192, found bfloat16 and heads of 256" in (kernels.refusal("flash", widest, Settings(), False) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.refusal("flash", widest, Settings(), False) is None
    assert "has no dropout" in (kernels.refusal("flex", right, Settings(dropout=0.1), False) or "")
    monkeypatch.setattr(kernels, "has_flash", lambda device: False)
    assert "has no FlashAttention" in (kernels.refusal("flash", right, Settings(), False) or "")


@pytest.mark.skipif(not hasattr(torch.nn.attention, "list_flash_attention_impls"), reason="since torch 2.11")
def test_torch_knows_every_flash_attention_that_the_config_takes() -> None:
    names = set(get_args(get_type_hints(TrainingConfig)["flash_attention"])) - {"torch"}
    assert names <= set(torch.nn.attention.list_flash_attention_impls())


@pytest.mark.parametrize(
    ("settings", "documents", "trains", "grain", "width", "expected"),
    [
        (Settings(), False, True, 128, 128, CudnnKernel),
        (Settings(), False, True, 100, 128, CudaKernel),
        (Settings(), False, False, 128, 128, CudaKernel),
        (Settings(), True, True, 128, 128, CudaKernel),
        (Settings(window=64), False, True, 128, 128, CudaKernel),
        (Settings(dropout=0.1), False, True, 128, 128, CudaKernel),
        (Settings(), False, True, 128, 256, CudaKernel),
    ],
)
def test_cudnn_serves_training_of_full_segments_on_hopper(
    settings: Settings,
    documents: bool,
    trains: bool,
    grain: int,
    width: int,
    expected: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "has_flash", lambda device: True)
    monkeypatch.setattr(kernels, "has_cudnn", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        q = torch.empty(1, 1, 1, width, dtype=torch.bfloat16, device="cuda", requires_grad=trains)
    assert isinstance(kernels.kernel_for(q, q, settings, documents, grain), expected)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    newer = kernels.kernel_for(q, q, settings, documents, grain)
    assert newer is None if settings.dropout else isinstance(newer, CudaKernel)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "has_flash", lambda device: True)
    monkeypatch.setattr(kernels, "has_cudnn", lambda device: False)
    assert isinstance(kernels.kernel_for(q, q, settings, documents, grain), CudaKernel)


@pytest.mark.parametrize("fault", ["absent", "fails", "forbidden", "another"])
def test_cudnn_that_does_not_serve_is_passed_over_with_one_line(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no valid execution plans built")

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: fault != "absent")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: fault != "forbidden")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10 if fault == "another" else 9, 0))
    monkeypatch.setattr(kernels.CudnnKernel, "forward", failing)
    with pytest.warns(UserWarning, match="no valid execution plans") if fault == "fails" else nullcontext():
        assert not kernels.has_cudnn.__wrapped__(torch.device("cpu"))


def test_the_grain_of_a_pattern_divides_the_lengths_of_its_calls() -> None:
    for pattern in (Pattern(512, 512, 128, 128), Pattern(500, 500, 128, 128), Pattern(64, 192, 128, 64)):
        for lower_right in (True, False):
            for call in segment_calls(pattern, lower_right):
                assert all(length % pattern.grain == 0 for length in (call.queries, call.left, call.own))


SCHEMAS = {
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused"
    ),
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask"
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k "
        "dropout_p is_causal"
    ),
    "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal",
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out query key value out logsumexp dropout_p is_causal"
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_private_operators_take_what_is_passed(name: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    by_place = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert by_place == SCHEMAS[name].split()
    if name.startswith("_flash"):
        named = {argument.name for argument in schema.arguments if argument.kwarg_only}
        assert {"window_size_left", "window_size_right"} <= named
    returned = {"_flash_attention_forward": 5, "_scaled_dot_product_cudnn_attention": 9}
    assert len(schema.returns) == returned.get(name, len(schema.returns))


class Context:
    """What autograd passes to a function; fake CUDA tensors have no autograd on a machine without a GPU."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        (CudaKernel(), Settings()),
        (CudaKernel(), Settings(window=300)),
        (CudaKernel(), Settings(dropout=0.1)),
        (CudnnKernel(), Settings()),
    ],
)
def test_shapes_and_types_with_the_real_operators_on_fake_cuda(
    kernel: Kernel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The method asks for a driver; the operator does not.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, other: torch.ops.aten.copy_(x, other))
    n, m, batch = 1800, 512, 2
    with FakeTensorMode(), torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        q, k, v = (
            torch.empty(n, batch, heads, 64, dtype=torch.bfloat16, device="cuda").permute(1, 2, 0, 3)
            for heads in (8, 4, 4)
        )
        calls = segment_calls(Pattern(n, n, m, m), kernel.lower_right)
        ctx: Any = Context()
        out = _Flash.forward(ctx, q, k, v, calls, kernel, settings)
        of_q, of_k, of_v, *_ = _Flash.backward(ctx, torch.empty_like(out))
        for x, like in ((out, q), (of_q, q), (of_k, k), (of_v, v)):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)


def test_pieces_with_the_real_operators_on_fake_cuda() -> None:
    n, batch = 600, 2
    documents = random_documents(batch, n, 1)
    on_host = document_pieces(documents, Pattern(n, n, 128, 128), torch.device("cpu"))
    with FakeTensorMode(), torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        q, k, v = (
            torch.empty(n, batch, heads, 64, dtype=torch.bfloat16, device="cuda").permute(1, 2, 0, 3)
            for heads in (8, 4, 4)
        )
        borders, _, rows, keys = (
            torch.empty(x.shape, dtype=torch.int32, device="cuda")
            for x in (*on_host.lengths[:2], on_host.queries, on_host.keys)
        )
        on_cuda = Pieces(Lengths(borders, borders, *on_host.lengths[2:]), rows, keys)
        ctx: Any = Context()
        out = _FlashPieces.forward(ctx, q, k, v, on_cuda, CudaKernel(), Settings(window=50), True)
        of_q, of_k, of_v, *_ = _FlashPieces.backward(ctx, torch.empty_like(out))
        for x, like in ((out, q), (of_q, q), (of_k, k), (of_v, v)):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)


def random_pattern(seed: int) -> tuple[Pattern, Tensor | None]:
    rng = random.Random(seed)
    m = rng.choice([64, 100, 128, 192, 256, 384, 512])
    n_key = rng.randint(1, 2600)
    first = min(n_key, rng.choice([m, max(1, m // 2)]))
    window = rng.choice([None, None, 5, m, m + 30])
    pattern = Pattern(rng.randint(1, n_key), n_key, m, first, rng.random() < 0.7, window)
    share = rng.choice([0.0, 0.001, 0.01])
    draws = torch.rand(2, n_key, generator=torch.Generator().manual_seed(seed))
    return pattern, (draws < share).long().cumsum(1) if share else None


@pytest.mark.parametrize("seeds", [range(start, start + 50) for start in range(0, 300, 50)], ids=str)
def test_a_block_mask_by_arithmetic_is_that_of_torch(seeds: range) -> None:
    for seed in seeds:
        pattern, documents = random_pattern(seed)
        got = block_mask(pattern, torch.device("cpu"), documents)
        batch = None if documents is None else 2
        wanted = torch_flex.create_block_mask(got.mask_mod, batch, None, *pattern[:2], device="cpu", BLOCK_SIZE=BLOCK)
        for side in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(wanted, f"{side}_num_blocks")
            assert torch.equal(counts, getattr(got, f"{side}_num_blocks")), (side, pattern)
            indices, ours = (getattr(mask, f"{side}_indices") for mask in (wanted, got))
            kept = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(indices[kept], ours[kept]), (side, pattern)


def test_a_block_mask_makes_no_pairs_of_positions() -> None:
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))])
            return out

    n = 16_384
    documents = random_documents(1, n, 1)
    with Largest():
        block_mask(Pattern(n, n, 512, 512), torch.device("cpu"), documents)
    assert largest <= max(n, (n // BLOCK + 1) ** 2)


@pytest.mark.parametrize("case", [case for case in cases() if case["queries"] > 1], ids=lambda case: f"{case['seed']}")
def test_flex_equals_the_definition_forward_and_backward(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Uncompiled, FlexAttention has a backward pass on a CPU, but refuses to run it there.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = [(case["batch"], case["groups"], case["n"], 4)] * 2
    shapes.insert(0, (case["batch"], case["groups"] * case["shared"], case["queries"], 4))
    q, k, v = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    case = {**case, "left": False}
    documents = random_documents(case["batch"], case["n"], case["seed"]) if case["documents"] else None
    kinds = {name: case[name] for name in ("look_back", "window")}
    out, _ = segment_attention(
        q, k, v, case["m"], **kinds, first_length=case["first"], documents=documents, backend="flex"
    )
    expected = dense_attention(q, k, v, seen_by_definition(case, documents))
    assert_close(out, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    pairs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, expected))
    for got, wanted in zip(*pairs, strict=True):
        assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Compile FlexAttention as on a GPU, but for the code of it; returns how many graphs there are."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, backend="eager")
    monkeypatch.setattr(flex, "_kernel", lambda _: compiled)
    monkeypatch.setattr(segment, "flex_serves", lambda q: q.shape[-2] >= 2 * BLOCK)
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def test_flex_is_compiled_for_no_length_anew(graphs: Callable[[], int]) -> None:
    def tensors(positions: int, trains: bool = False) -> list[Tensor]:
        shapes = [(1, positions, heads, 16) for heads in (4, 2, 2)]
        return [torch.randn(shape).transpose(1, 2).requires_grad_(trains) for shape in shapes]

    lengths = (512, 640, 768, 1000, 333, 700, 701, 702, 703, 704, 705)
    for n in lengths:
        out, _ = segment_attention(*tensors(n, trains=True), 128, backend="flex")
        out.sum().backward()
    assert graphs() <= 2
    with torch.no_grad():
        for n in lengths:
            segment_attention(*tensors(n), 128, backend="flex")
            documents = torch.zeros(1, n, dtype=torch.int64)
            segment_attention(*tensors(n), 128, documents=documents, backend="flex")
        cache = SegmentCache(128, backend="flex")
        for n in (5, 300, 333, 1, 1, 77, 300, 290, 128, 129, 290, 130, 131, 777):
            q, k, v = tensors(n)
            cache.attend(q, KeyValue(k, v))
    assert graphs() <= 6 < torch._dynamo.config.recompile_limit


def test_what_was_made_of_documents_goes_with_them(stand_in: StandIn) -> None:
    made = pieces._MADE
    before = len(made)
    x = torch.randn(1, 2, 8, 4)
    left = KeyValue(x[:, :, :4], x[:, :, :4])
    for _ in range(3):
        segment_attention(x, x, x, 4, left, documents=torch.zeros(1, 12, dtype=torch.int64))
    gc.collect()
    assert len(made) == before


def test_one_tensor_of_documents_serves_several_kernels() -> None:
    documents = torch.zeros(1, 256, dtype=torch.int64)
    x = torch.randn(1, 2, 256, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "kernel_for", lambda *_: StandIn())
        out, _ = segment_attention(x, x, x, 64, documents=documents)
    other, _ = segment_attention(x, x, x, 64, documents=documents, backend="flex")
    assert_close(out, other, rtol=1e-4, atol=1e-4)


def test_one_causal_segment_is_left_to_torch(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(segment, "attend", lambda q, *_, **__: asked.append(1) or q)
    monkeypatch.setattr(segment, "flex_attention", pytest.fail)
    with FakeTensorMode():
        q = torch.empty(1, 2, 64, 16, dtype=torch.bfloat16, device="cuda")
        segment_attention(q, q, q, 1024)
    assert (len(asked), stand_in.calls) == (1, 0)


def test_the_reference_keeps_scores_in_float32() -> None:
    q, k, v = (3 * torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    halves = [x.bfloat16() for x in (q, k, v)]
    exact = reference_attention(*(x.double() for x in halves))
    assert_close(reference_attention(*halves).double(), exact, rtol=2**-8, atol=2**-8)
