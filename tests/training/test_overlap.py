"""The test that a run begins with where its JSON asks for ``overlap_comm``."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ecp_scale.command_line import load_preset, preset_names
from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.parallel.groups import Groups
from ecp_scale.training import overlap
from ecp_scale.training.overlap import check_overlap, compare_norms, gradient_norms, small_model
from tests.corpus import ShardedText
from tests.launching import ROOT, metrics, run_successfully
from tests.parallel.layouts import Layout

PRESETS = {"scaled-125m": 1, "scaled-6b7": 64, "scaled-30b": 256, "scaled-70b": 512, "paper-12l": 1, "demo": 1}


def possible_runs() -> Iterator[tuple[str, Config]]:
    """Every architecture in every layout that it has."""
    for name, architecture in itertools.product(PRESETS, ARCHITECTURES):
        config = load_preset(name)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, architecture=architecture))
        if not config.problems(PRESETS[name]):
            yield name, config


def test_the_small_model_is_one_of_the_layout() -> None:
    runs = list(possible_runs())
    assert {name for name, _ in runs} == PRESETS.keys() <= set(preset_names())
    for name, config in runs:
        assert small_model(config, PRESETS[name]).problems(PRESETS[name]) == [], (name, config.model.architecture)


def test_both_ways_give_the_same_norms(groups: Groups) -> None:
    small = small_model(load_preset("scaled-125m"), 1)
    content: dict[str, Any] = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    both = [gradient_norms(small, overlap._with_overlap(content, way), groups, 1) for way in (False, True)]
    assert both[0] == both[1]
    assert len(set(both[0])) == overlap.STEPS
    check_overlap(load_preset("scaled-125m"), content, groups, 1)


def test_other_norms_are_refused_with_both(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([[1.0, 2.0, 3.0], [1.0, 2.5, 9.0]])
    monkeypatch.setattr(overlap, "gradient_norms", lambda *_: next(found))
    content: dict[str, Any] = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    with pytest.raises(InputError, match=r"in step 2 of a test model their norm is 2\.5 with it and 2 without; set it"):
        check_overlap(load_preset("scaled-125m"), content, groups, 1)
    check_overlap(load_preset("scaled-125m"), {"zero_optimization": {"stage": 2}}, groups, 1)  # nothing to compare
    with pytest.raises(InputError, match="is nan with it"):
        compare_norms([1.0], [float("nan")], 1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_launch_with_overlap_learns_what_one_without_does(
    stage: int, sharded_text: ShardedText, tmp_path: Path
) -> None:
    content = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    found = []
    for way in (False, True):
        content["zero_optimization"]["overlap_comm"] = way
        file = tmp_path / f"{way}.json"
        file.write_text(json.dumps(content))
        words = Layout(data=2, zero=stage, steps=3).options(sharded_text, tmp_path / str(way))
        words[words.index("--deepspeed_config") + 1] = str(file)
        run_successfully("launch/pretrain_ecp.py", *words, ranks=2)
        found.append([record["loss"] for record in metrics(tmp_path / str(way))])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
