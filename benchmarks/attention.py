"""One attention layer, forward and backward: against PyPI's local-attention and full causal attention, and kernels
against each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import KEPT, Contender, alternate, device, medians, ratio, side_by_side
from ecp_scale.attention import Settings, segment_attention
from ecp_scale.attention.calls import Pattern, segment_calls
from ecp_scale.attention.flash import flash_attention
from ecp_scale.attention.kernels import CpuKernel, CudaKernel, CudnnKernel, Kernel
from ecp_scale.config import AttentionBackend
from ecp_scale.config.geometry import Ecp, Transformer
from ecp_scale.parallel.device import local_device

OURS, LOCAL, FULL = "ours", "local-attention", "full causal"
HEADS, HEAD_WIDTH = 8, 64


def inputs_of(
    length: int, dtype: torch.dtype, heads: Sequence[int] = (HEADS, HEADS, HEADS), width: int = HEAD_WIDTH
) -> list[Tensor]:
    """Queries, keys and values (1, H, n, E), with positions outermost as a linear layer leaves them."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, length, number, width) for number in heads]
    raw = [torch.randn(shape, generator=generator).to(device(), dtype).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in raw]


def local_attention(segment_length: int) -> Callable[..., Tensor]:
    """The same pattern by local-attention: causal, one window of look-back, no positions of its own."""
    from local_attention import LocalAttention

    layer = LocalAttention(
        dim=HEAD_WIDTH, window_size=segment_length, causal=True, look_backward=1, look_forward=0, dropout=0.0,
        autopad=False, exact_windowsize=False, use_rotary_pos_emb=False,
    )  # fmt: skip
    return layer


@contextmanager
def passes(name: str, length: int, segment_length: int, dtype: torch.dtype) -> Iterator[Callable[[], list[Tensor]]]:
    """Forward and backward of one of them: the attended values, and the gradients of q, k and v."""
    if name == OURS or name.endswith(KEPT):
        local_device(0)  # chooses how this process allocates
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: segment_attention(q, k, v, segment_length)[0],
        FULL: lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    function = functions[name] if name in functions else local_attention(segment_length)
    inputs = inputs_of(length, dtype)

    def run() -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]

    yield run


def largest_difference(length: int, segment_length: int, dtype: torch.dtype) -> float:
    """Between our values and gradients and local-attention's."""
    with passes(OURS, length, segment_length, dtype) as ours, passes(LOCAL, length, segment_length, dtype) as theirs:
        return max((a.float() - b.float()).abs().max().item() for a, b in zip(ours(), theirs(), strict=True))


def compare(length: int, segment_length: int, dtype: torch.dtype, rounds: int, full: bool) -> dict[str, Any]:
    """Seconds and memory of each, how many times as fast as each peer ours is, and the largest difference."""
    names = [OURS, LOCAL, LOCAL + KEPT] + [FULL] * full
    contenders: dict[str, Contender] = {name: partial(passes, name, length, segment_length, dtype) for name in names}
    seconds, memory = side_by_side(contenders, rounds)
    found = {
        name: {
            "milliseconds": middle * 1e3,
            "peak_bytes": memory[name],
            "ours_is_times_as_fast": ratio(seconds, name, OURS),
        }
        for name, middle in medians(seconds).items()
    }
    found[LOCAL]["largest_difference"] = largest_difference(length, segment_length, dtype)
    if full:
        # FLOPs are proportional to the visible pairs.
        ours, all_pairs = (
            geometry(1, length, segment_length, 0, 0, 0, 0).score_pairs(0) for geometry in (Ecp, Transformer)
        )
        share = ours / all_pairs
        found[FULL]["our_share_of_its_flops_per_second"] = share * found[FULL]["ours_is_times_as_fast"]
    return found


class TwoCalls(CudaKernel):
    """FlashAttention-2 as kernels without lower-right masks are called: own keys, then left ones."""

    lower_right = False


def _by_backend(q: Tensor, k: Tensor, v: Tensor, segment_length: int, backend: AttentionBackend) -> Tensor:
    return segment_attention(q, k, v, segment_length, backend=backend)[0]


def compare_kernels(length: int, segment_length: int, rounds: int) -> dict[str, Any]:
    """Milliseconds, and TFLOP/s of visible pairs, of every kernel here, at the heads of scaled-1b3 in bf16."""
    heads, groups, width = 16, 8, 128
    q, k, v = inputs_of(length, torch.bfloat16, (heads, groups, groups), width)
    pattern = Pattern(length, length, segment_length, segment_length)
    kernels: dict[str, Kernel] = {"torch's flash for CPUs, two calls": CpuKernel()}
    backends: tuple[AttentionBackend, ...] = ("sdpa",)
    if device().type == "cuda":
        kernels = {"FlashAttention-2, one call": CudaKernel(), "FlashAttention-2, two calls": TwoCalls()}
        kernels["cuDNN, two calls"] = CudnnKernel()
        backends = ("sdpa", "flex")
    functions: dict[str, Callable[[], Tensor]] = {}
    for name, kernel in kernels.items():
        calls = segment_calls(pattern, kernel.lower_right)
        functions[name] = partial(flash_attention, q, k, v, calls, kernel, Settings())
    for backend in backends:
        functions[backend] = partial(_by_backend, q, k, v, segment_length, backend)
    passes = {name: lambda run=run: torch.autograd.grad(run().sum(), (q, k, v)) for name, run in functions.items()}
    seconds = medians(alternate(passes, rounds))
    # Twice as much backward as forward, and the scores once more, of which flash kernels cannot do without.
    flops = 3.5 * 4 * heads * width * Ecp(1, length, segment_length, 0, 0, 0, 0).score_pairs(0)
    return {
        name: {"milliseconds": middle * 1e3, "teraflops": flops / middle / 1e12} for name, middle in seconds.items()
    }
