"""Digests of parameters: the same however they are shared, another one for any change."""

import itertools

import pytest
import torch

from ecp_scale.parallel import digests
from ecp_scale.parallel.digests import as_text, difference, digest, summed
from ecp_scale.parallel.partition import Partition

PARTITIONS = [Partition(0, vocabulary_rows=37), Partition(0), Partition(1), Partition(None)]


def by_hand(whole: torch.Tensor) -> int:
    """The definition, one element after another."""
    total = 0
    for number, bits in enumerate(whole.flatten().view(torch.int32).tolist()):
        mixed = (bits * digests.OF_BITS) % 2**32
        mixed = (mixed + number * digests.OF_NUMBER) % 2**32
        mixed ^= mixed >> 15
        mixed = (mixed * digests.OF_BOTH) % 2**32
        total += signed(mixed ^ (mixed >> 13))
    return total % 2**64


def signed(number: int) -> int:
    """As an int32."""
    return number - 2**32 if number >= 2**31 else number


def test_it_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(digests.ELEMENTS, "cpu", 7)
    whole = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
    assert digest(whole.flatten()) == by_hand(whole)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("piece", [1, 13, 1000])
def test_the_shares_and_pieces_of_any_layout_have_the_digest_of_the_whole(
    partition: Partition, size: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(digests.ELEMENTS, "cpu", 11)
    whole = torch.randn(partition.vocabulary_rows or 40, 8, generator=torch.Generator().manual_seed(2))
    total = 0
    for rank in range(size if partition.partition_dim is not None else 1):
        part = partition.split(whole, size, rank, 40)
        share = partition.share(part.shape, size, rank)
        # ZeRO pads its last pieces.
        flat = torch.cat((part.flatten(), torch.full((-part.numel() % piece,), torch.nan)))
        total += sum(digest(flat[start : start + piece], share, start) for start in range(0, len(flat), piece))
    assert total % 2**64 == digest(whole.flatten())


def test_any_bit_shows_and_so_do_elements_that_change_places() -> None:
    whole = torch.randn(64, generator=torch.Generator().manual_seed(3))
    found = []
    for element, bit in itertools.product(range(64), range(32)):
        flipped = whole.clone()
        flipped.view(torch.int32)[element] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        found.append(digest(flipped))
    for one, other in itertools.combinations(range(0, 64, 7), 2):
        swapped = whole.clone()
        swapped[one], swapped[other] = whole[other], whole[one]
        found.append(digest(swapped))
    assert len(found) == 64 * 32 + 45
    assert digest(whole) not in found
    assert digest(whole.bfloat16()) == digest(whole.bfloat16().float()) != digest(whole)


def test_the_first_difference_is_named() -> None:
    saved = summed(["a", "b", "c"], [{"a": 1, "b": 2}, {"b": 3, "c": 2**64 + 4}])
    assert saved == {"a": as_text(1), "b": as_text(5), "c": as_text(4)}
    assert difference(saved, saved) is None
    text = difference({"a": as_text(1), "b": as_text(6), "d": as_text(0)}, saved)
    assert text == "parameter b has the digest 0000000000000006, expected 0000000000000005 (3 of 4 differ)"
    assert "parameter a has the digest none, expected 00" in str(difference({}, saved))
