"""A GPU gives the digests of the CPU."""

import pytest
import torch

from ecp_scale.parallel import digests
from ecp_scale.parallel.digests import digest
from ecp_scale.parallel.partition import Partition


@pytest.mark.parametrize("partition", [Partition(0, vocabulary_rows=999), Partition(0), Partition(1), Partition(None)])
@pytest.mark.parametrize("elements", [1 << 24, 1000])
def test_digests_are_those_of_the_cpu(partition: Partition, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(digests.ELEMENTS, "cuda", elements)
    values = torch.randn(1000, 96, generator=torch.Generator().manual_seed(1))
    share = partition.share(values.shape, 4, 3)
    for part in (values, values.bfloat16()):
        flat = part.flatten()
        assert digest(flat[500:].cuda(), share, 500) == digest(flat[500:], share, 500)
