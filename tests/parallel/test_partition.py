"""Whole tensors to shares and back."""

import math

import pytest
import torch

from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.partition import Partition, load_full
from tests.models.settings import SCALED, build


@pytest.mark.parametrize("layout", [Partition(0, vocabulary_rows=7), Partition(0), Partition(1), Partition(None)])
def test_a_share_is_where_the_split_takes_it_from(layout: Partition) -> None:
    whole = torch.randn(7 if layout.vocabulary_rows else 6, 4)
    padded_rows = 8 if layout.vocabulary_rows else 6
    again = torch.full((whole.numel(),), math.nan)
    for rank in range(2):
        split = layout.split(whole, 2, rank, padded_rows)
        share = layout.share(split.shape, 2, rank)
        found = torch.zeros(split.numel())
        for run in share.runs(0, split.numel()):
            found[run.start :][: run.length] = whole.flatten()[run.whole_start :][: run.length]
        assert torch.equal(found.view(split.shape), split)
        for run in share.within(0, whole.numel()):
            again[run.whole_start :][: run.length] = found[run.start :][: run.length]
    assert torch.equal(again.view(whole.shape), whole)


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
