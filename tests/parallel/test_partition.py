"""Whole tensors to shares and back."""

import pytest
import torch

from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.partition import Partition, load_full
from tests.models.settings import SCALED, build


@pytest.mark.parametrize("layout", [Partition(0, vocabulary_rows=7), Partition(0), Partition(1), Partition(None)])
def test_merge_undoes_split(layout: Partition) -> None:
    whole = torch.randn(7 if layout.vocabulary_rows else 6, 4)
    padded_rows = 8 if layout.vocabulary_rows else 6
    shares = [layout.split(whole, 2, rank, padded_rows) for rank in range(2)]
    assert torch.equal(layout.merge(shares), whole)
    if layout.partition_dim is not None:
        assert shares[0].numel() < whole.numel()


def test_replicas_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        Partition(None).merge([torch.zeros(2), torch.ones(2)])


def test_tensors_that_do_not_fit_are_all_named(groups: Groups) -> None:
    model = build(SCALED, groups)
    tensors = {name: parameter.clone() for name, parameter in model.named_parameters()}
    del tensors["norm.weight"]
    tensors["layers.0.attention.query.weight"] = torch.zeros(3, 3)
    tensors["extra"] = torch.zeros(1)
    with pytest.raises(InputError) as error:
        load_full(model, model.parallel, tensors, "model.safetensors")
    for part in ("norm.weight is missing", "query.weight has shape [3, 3], expected [24, 24]", "extra is not part"):
        assert part in str(error.value)
