"""Kernels that are compiled for training, as machine code of an H100: how many, what they spill and compute with.

Bounds are what torch 2.13 with triton 3.8 gives, rounded up; docs/performance.md has the figures.
"""

import importlib.util

import pytest
import torch

from ecp_scale.attention import flex
from tests.kernels.sm90 import cases, flex_kernels

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="needs the triton wheel, which torch for CPUs comes without: make test-kernels",
    ),
]
SHARED = 227 << 10
"""Bytes that a block may ask for."""
POINTWISE = {
    "RMSNorm": 3,
    "LayerNorm": 3,
    "sum and RMSNorm": 3,
    "sum and LayerNorm": 3,
    "SwiGLU": 2,
    "rotary positions": 2,
    "losses and gradients": 1,
}
"""Kernels of both passes."""


@pytest.mark.parametrize("name", POINTWISE)
def test_a_pointwise_function_is_few_kernels_that_stay_in_registers(name: str) -> None:
    kernels = cases()[name]()
    assert 1 <= len({kernel.name for kernel in kernels}) <= POINTWISE[name]
    assert max(kernel.stack for kernel in kernels) <= 64
    assert max(kernel.shared for kernel in kernels) <= 48 << 10


@pytest.mark.parametrize("name", [name for name in cases() if "flex" in name])
def test_flex_is_compiled_within_what_a_block_has(name: str) -> None:
    kernels = cases()[name]()
    products = [kernel for kernel in kernels if "_tem_" in kernel.name]
    assert len(products) == 2, "one kernel forward, one backward"
    assert max(kernel.shared for kernel in kernels) <= SHARED
    assert max(kernel.stack for kernel in products) <= 768
    for kernel in products:
        if "TF32" not in name or "backward" not in kernel.name:
            assert (kernel.tensor_core > 0) == ("bf16" in name or "TF32" in name)


def test_a_kernel_that_spills_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the blocks that torch chooses for float32."""
    monkeypatch.setattr(flex, "kernel_options", lambda *_: None)
    assert max(kernel.stack for kernel in flex_kernels(torch.float32, 128)) > 2000


def test_narrow_heads_are_padded_to_what_the_kernel_takes() -> None:
    assert sum("_tem_" in kernel.name for kernel in flex_kernels(torch.bfloat16, 8)) == 2
