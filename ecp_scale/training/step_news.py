"""What ranks tell each other with the message about the loss of a step, as whole numbers that are summed."""

from collections.abc import Sequence
from typing import NamedTuple

from ecp_scale.data.digest import PARTS, from_parts
from ecp_scale.training.rank_times import RankTimes, as_numbers, of_all


def to_numbers(
    digest_parts: Sequence[int], save: tuple[int, int], spikes: int, times: RankTimes | None, rank: int, ranks: int
) -> list[int]:
    """What one rank tells.

    Args:
        digest_parts: of the samples that it has read for the step.
        save: whether its part of the save in progress is written, and whether that failed.
        spikes: 1 where the run is to go back, on the first rank.
        times: of its step before.
        rank: its number.
        ranks: of the launch.
    """
    return [*digest_parts, *save, spikes, *as_numbers(times, rank, ranks)]


class StepNews(NamedTuple):
    """What all ranks have told."""

    digest: int
    """Of the samples of the step."""
    written: int
    """Ranks whose part of the save in progress is written."""
    failed: int
    """Ranks whose part is not, and will not be."""
    spiked: int
    """1 where the run is to go back."""
    times: list[RankTimes]
    """Of the step before, by rank; empty where they are not known."""

    @classmethod
    def of(cls, sums: Sequence[int], readers: int) -> "StepNews":
        """From the sums of what ranks have told, of whom ``readers`` each read the same samples."""
        digest = from_parts([total // readers for total in sums[:PARTS]])
        written, failed, spiked, *times = sums[PARTS:]
        return cls(digest, written, failed, spiked, of_all(times))
