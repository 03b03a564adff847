"""Blends: exact shares, no window twice or never, whatever the weights become; and the digest of what was read."""

import math
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecp_scale.config import TrainingConfig
from ecp_scale.data.batches import TrainingBatches
from ecp_scale.data.blend import Blend
from ecp_scale.data.digest import from_parts, sample_digest, to_parts
from ecp_scale.data.mixture import LONGEST_PERIOD, Mixture, whole_numbers
from ecp_scale.errors import InputError
from ecp_scale.preparation.preprocessing import preprocess
from tests.corpus import ShardedText

WEIGHTS = st.lists(st.integers(0, 100).map(lambda n: n / 10), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.01)


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda weights: sum(weights) > 1e-3))
def test_whole_weights_are_the_weights(weights: list[float]) -> None:
    whole = whole_numbers(weights)
    assert math.gcd(*whole) == 1
    for weight, parts in zip(weights, whole, strict=True):
        assert parts * sum(map(Fraction, map(repr, weights))) == Fraction(repr(weight)) * sum(whole)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(lambda weights: sum(weights) > 0))
def test_every_corpus_is_less_than_a_sample_from_its_share_at_every_point(weights: list[int]) -> None:
    assert largest_error([number / 10 for number in weights], 2 * sum(weights)) < 1


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([1.0] * 1025, id="1,025 equal ones"),
        pytest.param([1.0] * 1100, id="1,100 equal ones"),
        pytest.param([1.0, *([1e-5] * 300)], id="one large and 300 small ones"),
    ],
)
def test_shares_are_right_for_any_number_of_corpora(weights: list[float]) -> None:
    assert largest_error(weights, 110_000) < 1


@pytest.mark.parametrize("weights", [[0.123456789, 0.5, 1 / 3, 1e-4], [1 / 3, 2 / 3], [1234567891.0, 987654321.0, 3e6]])
def test_weights_without_a_period_do_not_drift(weights: list[float]) -> None:
    mixture, total = Mixture([0], [weights]), sum(map(Fraction, map(repr, weights)))
    assert largest_error(weights, 5000) < 2
    for samples, bound in ((LONGEST_PERIOD * 3, 1), (LONGEST_PERIOD * 1000, 1), (10**9, 2), (10**11 + 7, 2)):
        counts = mixture.counts(samples)
        assert counts.sum() == samples
        for weight, count in zip(weights, counts.tolist(), strict=True):
            assert abs(count - samples * Fraction(repr(weight)) / total) < bound
        assert mixture.locate(samples)[1] in counts


def test_a_share_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(InputError, match=r"corpus number 2 has a share of 8\.9e-08"):
        Mixture([0], [[1.0, 1e-7, 0.1234567]])


def largest_error(weights: list[float], samples: int) -> float:
    """Largest difference of any corpus from its share, in samples, behind any of the first samples."""
    mixture = Mixture([0], [weights])
    counts = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    worst = 0.0
    for sample in range(samples):
        corpus, position = mixture.locate(sample)
        assert position == counts[corpus]
        counts[corpus] += 1
        if len(weights) < 50 or sample % 97 == 0 or sample < 2000:
            worst = max(worst, float(np.abs(counts - shares * (sample + 1)).max()))
    assert mixture.counts(samples).tolist() == counts.tolist()
    return worst


@settings(max_examples=25, deadline=None)
@given(phases=st.lists(st.tuples(st.integers(1, 3000), WEIGHTS), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_no_position_of_any_corpus_repeats_or_is_skipped(phases: list[tuple[int, list[float]]], seed: int) -> None:
    starts = np.cumsum([0, *(length for length, _ in phases[:-1])]).tolist()
    mixture = Mixture(starts, [weights for _, weights in phases])
    total = sum(length for length, _ in phases)
    found = [mixture.locate(sample) for sample in range(total)]
    for corpus in range(3):
        positions = [position for number, position in found if number == corpus]
        assert positions == list(range(len(positions)))
    scattered = random.Random(seed).sample(range(total), min(total, 50))
    fresh = Mixture(starts, [weights for _, weights in phases])
    assert [fresh.locate(sample) for sample in scattered] == [found[sample] for sample in scattered]


def test_a_later_phase_changes_no_sample_before_it() -> None:
    short = Mixture([0], [[0.7, 0.3]])
    changed = Mixture([0, 5000], [[0.7, 0.3], [0.1, 0.9]])
    assert all(short.locate(sample) == changed.locate(sample) for sample in range(5000))
    later = Counter(changed.locate(sample)[0] for sample in range(5000, 6000))
    assert later == {0: 100, 1: 900}


def test_places_are_found_far_into_a_run_at_once() -> None:
    mixture = Mixture([0, 10**11], [[0.5, 0.5], [0.25, 0.75]])
    corpus, position = mixture.locate(4 * 10**11)
    expected = 5 * 10**10 + 3 * 10**11 * (0.25 if corpus == 0 else 0.75)
    assert abs(position - expected) < 1


@pytest.fixture
def two(sharded_text: ShardedText, tmp_path: Path) -> dict[str, float]:
    """Two corpora and their weights."""
    other = str(tmp_path / "other")
    lines = tmp_path / "other.txt"
    lines.write_text("\n".join(sharded_text.documents[0].splitlines()[:400]))
    preprocess([str(lines)], f"sentencepiece:{sharded_text.tokenizer}", other)
    return {sharded_text.prefix: 0.75, other: 0.25}


def test_within_an_epoch_of_a_corpus_no_window_repeats(two: dict[str, float]) -> None:
    first, second = two
    blend = Blend([(0, two), (100 * 64, {first: 0.5, second: 0.5})], 64, seed=1)
    windows: list[list[int]] = [[], []]
    for sample in range(400):
        corpus, window = blend.locate(sample)
        windows[corpus].append(window)
    for whole, seen in zip(blend.corpora, windows, strict=True):
        epochs = [seen[start : start + whole.windows] for start in range(0, len(seen), whole.windows)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(0 <= window < whole.windows for window in seen)
    assert len(windows[1]) > blend.corpora[1].windows, "the small corpus begins a second epoch"


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_the_digest_of_a_step_is_the_same_in_every_layout(two: dict[str, float], ranks: int, micro: int) -> None:
    config = TrainingConfig(micro_batch_size=micro, global_batch_size=4)
    sums = [0, 0, 0, 0]
    for rank in range(ranks):
        batches = TrainingBatches(Blend([(0, two)], 64, seed=1), config, ranks, rank)
        read = batches.after(7 * 4 * 64, 4)
        assert sum(map(len, read.micro_batches)) == 4 // ranks
        sums = [total + part for total, part in zip(sums, read.digest_parts, strict=True)]
    blend = Blend([(0, two)], 64, seed=1)
    entries = [blend.digest(sample, *blend.locate(sample)) for sample in range(28, 32)]
    assert from_parts(sums) == sum(entries) % 2**64


def test_the_digest_notices_a_swap_and_a_repetition() -> None:
    assert sample_digest(1, 0, 5) + sample_digest(2, 0, 6) != sample_digest(1, 0, 6) + sample_digest(2, 0, 5)
    assert sample_digest(1, 0, 5) != sample_digest(1, 1, 5)
    assert sample_digest(1, 0, 5, "ab") != sample_digest(1, 0, 5, "cd")
    assert from_parts([3 * part for part in to_parts(2**64 - 1)]) == 3 * (2**64 - 1) % 2**64


def test_history_tells_phases_that_have_begun(two: dict[str, float]) -> None:
    first = next(iter(two))
    blend = Blend([(0, {first: 1.0}), (1000, two)], 64, seed=1)
    assert blend.history(0) == blend.history(999) == blend.history(1000)
    assert blend.history(1000)["corpora_tokens"] == [blend.corpora[0].tokens]
    assert blend.history(1001)["blend"] == [[0, [1.0, 0.0]], [1000, [0.75, 0.25]]]
    assert Blend([(0, {first: 1.0})], 64, seed=1).history(1000) == blend.history(1000)


def test_corpora_of_other_tokenizers_do_not_blend(sharded_text: ShardedText, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / "x"))
    with pytest.raises(InputError, match=r"corpus .*x was made with tokenizer"):
        Blend([(0, {sharded_text.prefix: 1.0, str(tmp_path / "x"): 1.0})], 64, seed=1)
