"""Whole tensors to shares and back."""

import random

import pytest
import torch

from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.partition import Partition, Share, load_full
from tests.models.settings import SCALED, build


@pytest.mark.parametrize("layout", [Partition(0, vocabulary_rows=7), Partition(0), Partition(1), Partition(None)])
def test_a_share_is_where_the_split_takes_it_from(layout: Partition) -> None:
    whole = torch.randn(7 if layout.vocabulary_rows else 6, 4)
    padded_rows = 8 if layout.vocabulary_rows else 6
    for rank in range(2):
        split = layout.split(whole, 2, rank, padded_rows)
        share = layout.share(split.shape, 2, rank)
        found = torch.zeros(split.numel())
        for run in share.runs(0, split.numel()):
            found[run.start :][: run.length] = whole.flatten()[run.whole_start :][: run.length]
        assert torch.equal(found.view(split.shape), split)


@pytest.mark.parametrize("layout", [Partition(0, vocabulary_rows=7), Partition(0), Partition(1), Partition(None)])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 4), (4, 2), (1, 1), (4, 4)])
def test_what_two_shares_have_in_common_is_the_same_elements(layout: Partition, sizes: tuple[int, int]) -> None:
    """Numbers stand for elements: what one share holds of another's is read from there and from nowhere else."""
    whole = torch.arange(28 if layout.vocabulary_rows else 32).view(-1, 4) + 1
    draw = random.Random(f"{layout}{sizes}")

    def shares(size: int) -> list[tuple[torch.Tensor, Share]]:
        split = [layout.split(whole, size, rank, padded_rows=8) for rank in range(size)]
        return [(part.flatten(), layout.share(part.shape, size, rank)) for rank, part in enumerate(split)]

    mine, theirs = (shares(size) for size in sizes)
    for values, share in mine:
        for _ in range(20):
            start = draw.randrange(len(values))
            stop = draw.randint(start + 1, len(values))
            found = torch.zeros(stop - start, dtype=torch.long)
            for others, other in theirs:
                for part in share.common(start, stop, other):
                    read = others[part.source :][: part.rows * part.length].view(part.rows, part.length)
                    for row, elements in enumerate(read):
                        found[part.target + row * part.stride :][: part.length] = elements
            assert torch.equal(found, values[start:stop])


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
