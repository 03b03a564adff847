"""One attention layer, forward and backward, against PyPI's local-attention and full causal attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import alternate, medians, peak_bytes, ratio
from ecp_scale.attention import segment_attention

OURS = "ours"
HEADS, HEAD_WIDTH = 8, 64


def inputs_of(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values (1, H, n, E), with positions outermost as a linear layer leaves them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(length)
    shape = (1, length, HEADS, HEAD_WIDTH)
    raw = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_() for x in raw]


def local_attention(segment_length: int) -> Callable[..., Tensor]:
    """The same pattern by local-attention: causal, one window of look-back, no positions of its own."""
    from local_attention import LocalAttention

    layer = LocalAttention(
        dim=HEAD_WIDTH, window_size=segment_length, causal=True, look_backward=1, look_forward=0, dropout=0.0,
        autopad=False, exact_windowsize=False, use_rotary_pos_emb=False,
    )  # fmt: skip
    return layer


def compare(length: int, segment_length: int, dtype: torch.dtype, rounds: int, full: bool) -> dict[str, Any]:
    """Seconds and memory of each, how many times as fast as each peer ours is, and the largest difference from it."""
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: segment_attention(q, k, v, segment_length)[0],
        "local-attention": local_attention(segment_length),
    }
    if full:
        functions["full causal"] = lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
    inputs = inputs_of(length, dtype)

    def both(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            out = function(*inputs)
            return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]

        return run

    runs = {name: both(function) for name, function in functions.items()}
    seconds = alternate(runs, rounds)
    ours = runs[OURS]()
    difference = max(
        (a.float() - b.float()).abs().max().item() for a, b in zip(ours, runs["local-attention"](), strict=True)
    )
    return {
        name: {
            "milliseconds": middle * 1e3,
            "peak_bytes": peak_bytes(runs[name]),
            "ours_is_times_as_fast": ratio(seconds, name, OURS),
            **({"largest_difference": difference} if name == "local-attention" else {}),
        }
        for name, middle in medians(seconds).items()
    }
