"""Flash kernels (arXiv 2205.14135) as torch has them: forward with the rows' normalisers, and backward given both.

A backward kernel that is given the output and the normaliser of the whole returns the gradients of its part of the
whole, so that calls over parts of the keys add up. Tensors are (C, Q, H, E) and (C, K, G, E): C stretches of positions,
in the type of their products; with ``Lengths`` they are (rows, heads, E), stretches of any length one behind the other.
"""

import warnings
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ecp_scale.config import AttentionBackend

_aten = torch.ops.aten
FLASH_TYPES = (torch.bfloat16, torch.float16)
CUDNN_WIDEST_HEAD, CUDNN_GRAIN = 128, 64
"""Heads and multiples of lengths that every cuDNN takes."""


GROUPS_ON_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
"""Trap: before, torch's kernel for CPUs takes grouped heads without a word, and reads and writes beyond the keys."""


Operands: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, or their gradients."""
Whole: TypeAlias = tuple[Tensor, Tensor]
"""Output and normalisers of rows over all of their keys."""
State: TypeAlias = tuple[Tensor, ...]
"""What a backward pass needs of the random state of its forward pass."""


class Lengths(NamedTuple):
    """Where stretches of queries and of keys begin in their rows, (C + 1) int32 each, and the longest of both."""

    of_queries: Tensor
    of_keys: Tensor
    most_queries: int
    most_keys: int


class Settings(NamedTuple):
    """What every call of a pattern shares: the window, None where there is none, and dropout of attention weights."""

    window: int | None = None
    dropout: float = 0.0


class Kernel(Protocol):
    """A flash kernel of some device."""

    lower_right: bool
    """Whether a causal call may have fewer queries than keys, the last of which stand together."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Output as the queries, normalisers (C, H, Q), and what the backward pass needs of the random state."""

    def backward(
        self,
        gradient: Tensor,
        operands: Operands,
        whole: Whole,
        causal: bool,
        settings: Settings,
        state: State,
        lengths: Lengths | None = None,
    ) -> Operands:
        """Gradients of queries, keys and values, given output and normalisers of the whole."""


class CpuKernel:
    """torch's flash kernel for CPUs: no windows, no dropout, and a causal mask for as many queries as keys."""

    lower_right = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """See ``Kernel``."""
        operands = (x.transpose(1, 2) for x in (q, k, v))
        out, normalisers = _aten._scaled_dot_product_flash_attention_for_cpu(*operands, 0.0, causal)
        return out.transpose(1, 2), normalisers, ()

    def backward(
        self,
        gradient: Tensor,
        operands: Operands,
        whole: Whole,
        causal: bool,
        settings: Settings,
        state: State,
        lengths: Lengths | None = None,
    ) -> Operands:
        """See ``Kernel``."""
        heads_first = (x.transpose(1, 2) for x in (gradient, *operands, whole[0]))
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_q, of_k, of_v = backward(*heads_first, whole[1], 0.0, causal)
        return of_q.transpose(1, 2), of_k.transpose(1, 2), of_v.transpose(1, 2)


class CudaKernel:
    """torch's FlashAttention for CUDA: windows, dropout and stretches of any length; FlashAttention-3 where active."""

    lower_right = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """See ``Kernel``."""
        sizes = lengths or Lengths(None, None, q.shape[1], k.shape[1])  # type: ignore[arg-type]
        out, normalisers, *state, _ = _aten._flash_attention_forward(
            q, k, v, *sizes, settings.dropout, causal, False, **_window(settings)
        )
        return out, normalisers, tuple(state)

    def backward(
        self,
        gradient: Tensor,
        operands: Operands,
        whole: Whole,
        causal: bool,
        settings: Settings,
        state: State,
        lengths: Lengths | None = None,
    ) -> Operands:
        """See ``Kernel``."""
        sizes = lengths or Lengths(None, None, operands[0].shape[1], operands[1].shape[1])  # type: ignore[arg-type]
        return _aten._flash_attention_backward(
            gradient, *operands, *whole, *sizes, settings.dropout, causal, *state, **_window(settings)
        )


class CudnnKernel:
    """cuDNN's attention as torch has it: no windows, no dropout (it would be rounded to sixteenths), and a causal mask
    for as many queries as keys; a quarter less time than FlashAttention-2 takes on Hopper.
    """

    lower_right = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """See ``Kernel``."""
        operands = (x.transpose(1, 2) for x in (q, k, v))
        out, normalisers, _, _, _, _, *state, _ = _aten._scaled_dot_product_cudnn_attention(
            *operands, None, True, 0.0, causal, False
        )
        return out.transpose(1, 2), normalisers.squeeze(-1), tuple(state)

    def backward(
        self,
        gradient: Tensor,
        operands: Operands,
        whole: Whole,
        causal: bool,
        settings: Settings,
        state: State,
        lengths: Lengths | None = None,
    ) -> Operands:
        """See ``Kernel``."""
        *heads_first, out = (x.transpose(1, 2) for x in (gradient, *operands, whole[0]))
        sizes = (None, None, operands[0].shape[1], operands[1].shape[1])
        backward = _aten._scaled_dot_product_cudnn_attention_backward
        found = backward(*heads_first, out, whole[1].unsqueeze(-1), *state, None, *sizes, 0.0, causal)
        of_q, of_k, of_v = (x.transpose(1, 2) for x in found)
        return of_q, of_k, of_v


def _window(settings: Settings) -> dict[str, Any]:
    """The kernel counts the positions before the query's own."""
    return {} if settings.window is None else {"window_size_left": settings.window - 1, "window_size_right": 0}


def kernel_for(q: Tensor, k: Tensor, settings: Settings, documents: bool, grain: int = 1) -> Kernel | None:
    """The flash kernel for queries (B, H, Nq, E) and keys (B, G, Nk, E), if there is one.

    ``grain`` divides the lengths of all stretches.
    """
    plain = settings == Settings() and not documents
    if q.device.type == "cuda":
        fits = q.dtype in FLASH_TYPES and q.shape[-1] % 8 == 0
        # Trap: cuDNN plans anew for every shape, for as long as many steps of generation.
        trains = plain and q.requires_grad and grain % CUDNN_GRAIN == 0 and q.shape[-1] <= CUDNN_WIDEST_HEAD
        if fits and trains and not has_newer_flash() and has_cudnn(q.device):
            return CudnnKernel()
        fits = fits and has_flash(q.device) and q.shape[-1] <= widest_head(q.device)
        # Trap: the newer ones have no dropout, and refuse it in the first step.
        return CudaKernel() if fits and not (settings.dropout and has_newer_flash()) else None
    groups = q.shape[1] == k.shape[1] or GROUPS_ON_CPU
    return CpuKernel() if plain and groups and q.device.type == "cpu" else None


def refusal(backend: AttentionBackend, q: Tensor, settings: Settings, documents: bool) -> str | None:
    """Why a backend that is asked for cannot train with what is asked for besides; None where it can.

    Args:
        backend: what is asked for.
        q: an example of queries (..., E), for device, type and head width.
        settings: window and dropout.
        documents: whether they are masked.
    """
    on_cpu = q.device.type == "cpu"
    if backend == "flex" and on_cpu:
        return "FlexAttention has no backward pass on a CPU"
    if backend == "flex" and settings.dropout:
        return f"FlexAttention has no dropout, and model.dropout is {settings.dropout:g}"
    if backend != "flash" or kernel_for(q, q, settings, documents) is not None:
        return None
    if on_cpu:
        asked = {
            f"dropout (model.dropout is {settings.dropout:g})": settings.dropout > 0,
            "documents (attention.document_mask is true)": documents,
            "windows (model.architecture is sliding_window)": settings.window is not None,
        }
        return (
            f"torch's flash kernel for CPUs has no {', no '.join(what for what, is_asked in asked.items() if is_asked)}"
        )
    if settings.dropout and has_newer_flash():
        return f"FlashAttention-3 and -4 have no dropout, and model.dropout is {settings.dropout:g}"
    if has_flash(q.device):
        width, kind, most = q.shape[-1], str(q.dtype).removeprefix("torch."), widest_head(q.device)
        return f"FlashAttention takes bf16 and heads of 8, 16, ... to {most}, found {kind} and heads of {width}"
    return "this GPU, or this build of torch, has no FlashAttention"


def has_newer_flash() -> bool:
    """Whether FlashAttention-3 or later has been put in place of torch's own, by ``activate_flash_attention_impl``."""
    asked = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)  # since torch 2.11
    return asked() not in (None, "FA2")


def put_flash(name: str) -> None:
    """Put another FlashAttention in the place of torch's own, for this process.

    Args:
        name: as torch knows it, such as ``FA3``.

    Raises:
        RuntimeError: if this torch does not know it, or its package cannot be loaded.
    """
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise RuntimeError(f"it needs torch 2.11, found {torch.__version__}")
    try:
        activate(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RuntimeError(f"its package cannot be loaded: {error}") from error


@cache
def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is there, wanted, and the better choice: on Hopper, where that was measured."""
    allowed = torch.backends.cudnn.enabled and torch.backends.cuda.cudnn_sdp_enabled()
    if not allowed or not torch.backends.cudnn.is_available() or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    x = torch.zeros(1, CUDNN_GRAIN, 1, CUDNN_GRAIN, dtype=torch.bfloat16, device=device)
    try:
        kernel = CudnnKernel()
        out, normalisers, state = kernel.forward(x, x, x, True, Settings())
        kernel.backward(x, (x, x, x), (out, normalisers), True, Settings(), state)
    except (RuntimeError, AttributeError) as error:
        warnings.warn(f"cuDNN's attention fails, and FlashAttention takes its place: {error}", stacklevel=2)
        return False
    return True


def widest_head(device: torch.device) -> int:
    """Of heads that FlashAttention trains on a GPU: others have too little shared memory for its backward pass."""
    return 256 if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0)) else 192


def has_flash(device: torch.device) -> bool:
    """Whether this GPU runs FlashAttention: from Ampere on, and where torch is built with it."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
