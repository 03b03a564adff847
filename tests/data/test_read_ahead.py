"""A step that is read ahead is the step that is asked for, and what is wrong with it is said when it is."""

import threading

import pytest

from ecp_scale.data.batches import ReadAhead, StepBatches
from ecp_scale.errors import DamagedDataError


class Batches:
    """Steps that are known by their first token; the one of 20 is damaged."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.was_read = threading.Semaphore(0)

    def after(self, tokens: int, sequences: int) -> StepBatches:
        self.asked.append((tokens, sequences))
        self.was_read.release()
        if tokens == 20:
            raise DamagedDataError("shard")
        return StepBatches([], [tokens, sequences])


def test_each_step_is_read_once_and_before_it_is_asked_for() -> None:
    batches = Batches()
    with ReadAhead(batches) as reader:
        assert reader.after(0, 2, (10, 3)).digest_parts == [0, 2]
        assert batches.was_read.acquire(timeout=10)
        assert batches.was_read.acquire(timeout=10)  # the next one, too, which nobody has asked for
        assert reader.after(10, 3, None).digest_parts == [10, 3]
    assert batches.asked == [(0, 2), (10, 3)]


def test_another_step_than_was_expected_is_read_then() -> None:
    with ReadAhead(Batches()) as reader:
        reader.after(0, 2, (10, 3))
        assert reader.after(10, 4, None).digest_parts == [10, 4]


def test_damage_is_said_at_its_own_step() -> None:
    with ReadAhead(Batches()) as reader:
        reader.after(0, 1, (20, 1))
        with pytest.raises(DamagedDataError, match="shard"):
            reader.after(20, 1, None)
