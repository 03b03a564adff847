"""Learning rates at their corners."""

import pytest

from ecp_scale.config import OptimizerConfig


def test_warm_up_rises_linearly_to_the_peak() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_tokens=100)
    assert [config.learning_rate_at(tokens, 1000) for tokens in (1, 50, 100, 999)] == [0.01, 0.5, 1.0, 1.0]


def test_cosine_falls_to_its_minimum_and_stays_there() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_tokens=100, min_lr_ratio=0.1)
    assert config.learning_rate_at(100, 1100) == 1.0
    assert config.learning_rate_at(600, 1100) == pytest.approx(0.55)
    assert config.learning_rate_at(1100, 1100) == pytest.approx(0.1)
    assert config.learning_rate_at(5000, 1100) == pytest.approx(0.1)


def test_decay_tokens_make_cosine_independent_of_the_length_of_the_run() -> None:
    config = OptimizerConfig(schedule="cosine", decay_tokens=500)
    assert config.learning_rate_at(200, 1000) == config.learning_rate_at(200, 9000)


def test_halving() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="halving", halving_tokens=100)
    assert [config.learning_rate_at(tokens, 0) for tokens in (99, 100, 250)] == [1.0, 0.5, 0.25]


def test_wsd_is_constant_and_falls_linearly_at_the_end_of_the_run() -> None:
    config = OptimizerConfig(
        learning_rate=1.0, schedule="wsd", warmup_tokens=100, cooldown_tokens=200, min_lr_ratio=0.1
    )
    rates = [config.learning_rate_at(tokens, 1000) for tokens in (50, 100, 500, 800, 900, 1000, 2000)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1])
    # A longer run is the same until its own end: a checkpoint of the stable phase serves runs of any length.
    assert config.learning_rate_at(800, 1000) == config.learning_rate_at(800, 9000)


def test_the_cool_down_of_wsd_is_a_fifth_of_the_run() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", min_lr_ratio=0.0)
    assert [config.learning_rate_at(tokens, 1000) for tokens in (800, 900, 1000)] == pytest.approx([1.0, 0.5, 0.0])
