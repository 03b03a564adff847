"""One model, one curve: every layout of ranks and ZeRO stage trains alike."""

import itertools
import math

import pytest

from tests.corpus import ShardedText
from tests.launching import metrics
from tests.parallel.layouts import (
    ARCHITECTURE_CURVES,
    BF16,
    CURVES,
    FEATURES,
    LAUNCH_SECONDS,
    MORE_ARCHITECTURE_CURVES,
    PRODUCT,
    Layout,
    trained,
)

TOLERANCE = 1e-5


def test_every_pair_of_features_is_trained_together() -> None:
    for first, second in itertools.combinations(FEATURES, 2):
        possible = {(getattr(layout, first), getattr(layout, second)) for layout in PRODUCT}
        assert {(getattr(layout, first), getattr(layout, second)) for layout in CURVES} >= possible
    assert {"paper", "scaled"} == {layout.settings for layout in CURVES if layout.context == 2}


@pytest.mark.parametrize(
    "layout",
    [
        *CURVES,
        *ARCHITECTURE_CURVES,
        *(
            pytest.param(layout, marks=[pytest.mark.exhaustive, pytest.mark.timeout(LAUNCH_SECONDS)])
            for layout in (*PRODUCT, *MORE_ARCHITECTURE_CURVES)
            if layout not in CURVES
        ),
    ],
    ids=str,
)
def test_loss_and_gradient_norm_equal_those_of_one_process(layout: Layout, sharded_text: ShardedText) -> None:
    single = metrics(trained(layout.alone(), sharded_text))
    spread = metrics(trained(layout, sharded_text))
    assert len(single) == len(spread) == layout.steps
    assert single[-1]["loss"] < single[0]["loss"] - 0.2
    for expected, got in zip(single, spread, strict=True):
        for key in ("loss", "grad_norm"):
            assert got[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=TOLERANCE), (got["step"], key)
        exact = ("step", "tokens", "lr", "data_digest")
        assert [got[key] for key in exact] == [expected[key] for key in exact]
    assert spread[-1]["validation_loss"] == pytest.approx(single[-1]["validation_loss"], rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("layout", BF16, ids=str)
def test_bf16_follows_the_fp32_curve(layout: Layout, sharded_text: ShardedText) -> None:
    single = metrics(trained(Layout(), sharded_text))
    rounded = metrics(trained(layout, sharded_text))
    assert all(math.isfinite(record["grad_norm"]) for record in rounded)
    assert rounded[-1]["skipped_steps"] == 0
    # bf16 keeps 8 bits of each number; over the mean of 256 tokens their errors cancel to about 1e-3.
    assert [record["loss"] for record in rounded] == pytest.approx([record["loss"] for record in single], abs=5e-3)
    assert [record["loss"] for record in rounded] != [record["loss"] for record in single]
