"""cuDNN's attention is never given what it computes wrongly: masks, and dropout."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ecp_scale.attention import KeyValue, kernels, sdpa
from ecp_scale.hub import attention_ecp
from ecp_scale.hub.configuration_ecp import EcpConfig


class Asked(NamedTuple):
    """How torch's scaled_dot_product_attention was called."""

    may_be_cudnn: bool
    heads_of_keys: int


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Calls that models and exported models make, on a GPU without a flash kernel."""
    found = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        found.append(Asked(torch.backends.cuda.cudnn_sdp_enabled(), k.shape[1]))
        return q

    for module in (sdpa, attention_ecp):
        monkeypatch.setattr(module, "scaled_dot_product_attention", stand_in)
    monkeypatch.setattr(kernels, "has_flash", lambda device: False)
    return found


@pytest.mark.parametrize(("masked", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)])
def test_cudnn_never_sees_a_mask_or_dropout(masked: bool, dropout: float, asked: list[Asked]) -> None:
    config = EcpConfig(width=64, heads=4, key_value_heads=2, layers=1, dropout=dropout)
    exported = attention_ecp.EcpAttention(config, 0).train()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with FakeTensorMode():
        q, k = (torch.empty(1, heads, 8, 16, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        seen = torch.ones(8, 8, dtype=torch.bool, device="cuda") if masked else None
        sdpa.attend(q, KeyValue(k, k), causal=False, dropout=dropout, window=5 if masked else None)
        exported._attend(q, k, k, seen)
    assert [one.may_be_cudnn for one in asked] == 2 * [not masked and not dropout]
    if masked:  # for grouped heads the kernel that makes all scores would be left
        assert [one.heads_of_keys for one in asked] == [4, 4]
    assert torch.backends.cuda.cudnn_sdp_enabled()
