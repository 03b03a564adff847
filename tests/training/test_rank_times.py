"""Times of all ranks by one message, and the ranks that are named for them."""

import random
from pathlib import Path

import pytest
import torch

from ecp_scale.data.digest import PARTS
from ecp_scale.parallel.device import Stopwatch
from ecp_scale.training.rank_times import WINDOW, RankTimes, SlowRanks, as_numbers, of_all, summary
from ecp_scale.training.step_news import StepNews, to_numbers
from ecp_scale.training.trackers import scalars
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout

HOSTS = ("a", "a", "b", "b")


def test_a_sum_over_ranks_is_the_list_of_all() -> None:
    times = [RankTimes(rank / 8, 1 + rank, 0.25) for rank in range(4)]
    told = [to_numbers([rank, 0, 0, 1], (1, 0), int(rank == 0), times[rank], rank, 4) for rank in range(4)]
    news = StepNews.of([sum(column) for column in zip(*told, strict=True)], readers=2)
    assert news.times == times
    assert (news.written, news.failed, news.spiked, news.digest) == (4, 0, 1, 3 + (2 << 48))
    assert summary(news.times)["ranks_forward_seconds"] == {"min": 1.0, "median": 2.5, "max": 4.0, "rank": 3}
    assert scalars({"step": 1, **summary(times)})["ranks_data_seconds/max"] == 3 / 8
    assert as_numbers(times[0], 0, 1) == of_all(as_numbers(None, 0, 4)) == of_all([]) == []
    assert summary([]) == {}
    assert len(to_numbers([0] * PARTS, (0, 0), 0, None, 0, 1)) == PARTS + 3


def times(forward: list[float], data: list[float] | None = None) -> list[RankTimes]:
    return [RankTimes(wait, seconds, 0.0) for seconds, wait in zip(forward, data or [0.0] * 4, strict=True)]


def test_a_rank_is_named_once_that_is_slow_step_after_step() -> None:
    drawn = random.Random(1)
    ranks = SlowRanks(HOSTS)
    for step in range(3 * WINDOW):
        usual = [drawn.uniform(0.9, 1.2) for _ in range(4)]
        usual[drawn.randrange(4)] *= 5 if step % 10 == 0 else 1  # a hiccup is no slow rank
        assert ranks.look(times(usual), 4.0) == []
    named = [found for _ in range(3 * WINDOW) for found in ranks.look(times([1.0, 1.0, 1.0, 2.0]), 4.0)]
    assert named == [(3, "rank 3 on host b takes 2.0 times as long for its forward passes as the median rank")]
    named = [found for _ in range(2 * WINDOW) for found in ranks.look(times([1.0] * 4, [0.0, 2.0, 0.0, 0.0]), 4.0)]
    assert named == [(1, "rank 1 on host a waits for its data for 50 % of a step")]
    two = SlowRanks(("a", "b"))
    named = [found for _ in range(WINDOW) for found in two.look([RankTimes(0, 1, 0), RankTimes(0, 2, 0)], 4.0)]
    assert [rank for rank, _ in named] == [1]


def test_a_stopwatch_counts_every_time_it_runs() -> None:
    watch = Stopwatch(torch.device("cpu"))
    assert watch.seconds == 0.0
    with watch.running():
        pass
    first = watch.seconds
    with watch.running():
        sum(range(100_000))
    assert watch.seconds > first > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_record_of_a_step_has_the_times_of_the_step_before(
    sharded_text: ShardedText, tmp_path: Path, ranks: int
) -> None:
    run = tmp_path / "run"
    run_successfully("launch/pretrain_ecp.py", *Layout(zero=1, steps=3).options(sharded_text, run), ranks=ranks)
    names = ["ranks_data_seconds", "ranks_forward_seconds", "ranks_wait_seconds"]
    found = [[name for name in record if name.startswith("ranks_")] for record in metrics(run)]
    assert found == ([[], names, names] if ranks == 2 else [[], [], []])
    for record in metrics(run)[1:] if ranks == 2 else []:
        for name in names:
            of = record[name]
            assert 0 <= of["min"] <= of["median"] <= of["max"] < record["step_seconds"] * 100
            assert of["rank"] in (0, 1)
