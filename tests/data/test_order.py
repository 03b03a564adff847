"""The order of samples and the batches made of it."""

from collections import Counter
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecp_scale.config import TrainingConfig
from ecp_scale.data.batches import TrainingBatches, validation_batches
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import ShardRecord, TextCounts
from ecp_scale.data.order import Permutation, SampleOrder
from ecp_scale.data.shards import TokenShard
from tests.corpus import ShardedText


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=8))
def test_every_permutation_is_a_bijection(size: int, key: str) -> None:
    assert sorted(map(Permutation(size, key), range(size))) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 10**13), data=st.data())
def test_large_permutations_stay_inside(size: int, data: st.DataObject) -> None:
    permutation = Permutation(size, "key")
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=20, unique=True))
    images = [permutation(index) for index in indices]
    assert len(set(images)) == len(images)
    assert all(0 <= image < size for image in images)


def test_a_permutation_shuffles() -> None:
    size = 10_000
    images = np.array([Permutation(size, "a")(i) for i in range(size)])
    other = np.array([Permutation(size, "b")(i) for i in range(size)])
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.05  # five standard deviations
    assert abs(np.corrcoef(images, other)[0, 1]) < 0.05  # five standard deviations
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05  # five standard deviations


def test_every_epoch_holds_every_window_once_in_an_order_of_its_own() -> None:
    order = SampleOrder(windows=50, seed=3)
    epochs = [[order.window(sample) for sample in range(50 * e, 50 * e + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.window(sample) for sample in range(50)] == epochs[0]


@pytest.fixture
def corpus(sharded_text: ShardedText) -> Corpus:
    return Corpus(sharded_text.prefix, 64)


def test_windows_tile_the_stream_across_shards(corpus: Corpus) -> None:
    stream = np.concatenate([corpus.shard(number).ids for number in range(len(corpus.manifest.shards))]).astype(
        np.int64
    )
    assert corpus.windows == (len(stream) - 1) // 64
    for number in range(corpus.windows):
        assert np.array_equal(corpus.window(number), stream[64 * number : 64 * number + 65])


class CountingIds:
    """Ids of a shard that is not there: each is its own place in the stream."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.arange(self.first + part.start, self.first + min(part.stop, self.count), dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 40), st.integers(10**9, 2**31), st.integers(1, 4 * 10**12)), min_size=1),
    length=st.sampled_from([1, 7, 64, 4096]),
)
def test_windows_of_corpora_of_any_size_begin_where_they_should(sizes: list[int], length: int) -> None:
    sizes = [*sizes, length + 1]
    corpus = Corpus.__new__(Corpus)
    corpus.lay_out(
        [ShardRecord(str(i), TextCounts(tokens=size), {}) for i, size in enumerate(sizes)], length, range(2**63)
    )
    borders = np.cumsum([0, *sizes]).tolist()
    shards = [SimpleNamespace(ids=CountingIds(*place)) for place in zip(borders, sizes, strict=False)]
    corpus.shard = lambda number: cast(TokenShard, shards[number])  # type: ignore[method-assign]
    assert corpus.tokens == borders[-1]
    touched = {border // length + step for border in borders for step in (-1, 0, 1)} | {0, corpus.windows - 1}
    for window in touched:
        if 0 <= window < corpus.windows:
            start = window * length
            assert np.array_equal(corpus.window(window), np.arange(start, start + length + 1))
    order = SampleOrder(corpus.windows, seed=1)
    assert all(0 <= order.window(sample) < corpus.windows for sample in (0, 1, corpus.windows - 1, corpus.windows))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 4), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_a_step_reads_the_same_samples_in_every_layout(sharded_text: ShardedText, ranks: int, micro: int) -> None:
    blend = Blend([(0, {sharded_text.prefix: 1.0})], 64, seed=1)

    def rows(ranks: int, micro: int, step: int) -> Counter[bytes]:
        config = TrainingConfig(micro_batch_size=micro, global_batch_size=8)
        found: Counter[bytes] = Counter()
        for rank in range(ranks):
            batches = TrainingBatches(blend, config, ranks, rank).after(step * 8 * 64, 8).micro_batches
            assert len(batches) == 8 // (ranks * micro)
            found.update(row.numpy().tobytes() for batch in batches for row in batch)
        return found

    for step in (0, 5):
        assert rows(ranks, micro, step) == rows(1, 8, step)
    assert rows(ranks, micro, 0) != rows(ranks, micro, 1)


@pytest.mark.parametrize(("ranks", "micro", "windows"), [(1, 4, 10), (2, 3, 10), (3, 2, 7), (2, 4, 1)])
def test_validation_counts_every_window_once_and_keeps_ranks_in_step(
    corpus: Corpus, ranks: int, micro: int, windows: int
) -> None:
    config = TrainingConfig(micro_batch_size=micro, validation_windows=windows)
    shares = [list(validation_batches(corpus, config, ranks, rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = torch.cat([batch[:count] for share in shares for batch, count in share])
    expected = torch.from_numpy(np.stack([corpus.window(number) for number in range(windows)]))
    assert sorted(map(tuple, counted.tolist())) == sorted(map(tuple, expected.tolist()))
