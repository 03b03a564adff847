"""The test that a run begins with where its JSON asks for ``overlap_comm``."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ecp_scale.command_line import load_preset, preset_names
from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.parallel.groups import Groups
from ecp_scale.training import overlap
from ecp_scale.training.overlap import check_overlap, compare, small_model, updates
from ecp_scale.zero import json_config
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


@pytest.mark.parametrize("stage", [2, 3])
def test_both_ways_give_the_same_updates(stage: int, groups: Groups) -> None:
    small = small_model(load_preset("scaled-125m"), 1)
    content: dict[str, Any] = {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    both = [updates(small, overlap._with_overlap(content, way), groups, 1) for way in (False, True)]
    assert torch.equal(*both)
    assert both[0].count_nonzero() > 0.5 * both[0].numel()
    check_overlap(load_preset("scaled-125m"), content, groups, 1)


def test_half_of_any_bucket_is_missed(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_model(load_preset("scaled-125m"), 1)
    reduce = DeepSpeedZeroOptimizer.average_tensor
    calls, late = 0, -1

    def late_once(self: DeepSpeedZeroOptimizer, tensor: Tensor, kind: torch.dtype) -> None:
        nonlocal calls
        if self.overlap_comm and calls == late:
            tensor[: len(tensor) // 2] *= 0.5
        calls += self.overlap_comm
        reduce(self, tensor, kind)

    monkeypatch.setattr(DeepSpeedZeroOptimizer, "average_tensor", late_once)
    content: dict[str, Any] = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    plain = updates(small, overlap._with_overlap(content, False), groups, 1)
    updates(small, overlap._with_overlap(content, True), groups, 1)
    messages = calls
    assert messages > 20 * overlap.STEPS
    for number in range(1, messages, 29):  # the first of every pass is empty
        calls, late = 0, number
        with pytest.raises(InputError, match="differs by"):
            compare(plain, updates(small, overlap._with_overlap(content, True), groups, 1), overlap.TOLERANCE["bf16"])


def test_other_updates_are_refused(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.ones(4, 3 * overlap.RUN - 5)
    wrong = plain.clone()
    wrong[2, overlap.RUN : 2 * overlap.RUN] = 0.75
    found = iter([plain, wrong])
    monkeypatch.setattr(overlap, "updates", lambda *_: next(found))
    content: dict[str, Any] = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    with pytest.raises(InputError, match=r"an update of weights differs by 25% from that without; set it to false"):
        check_overlap(load_preset("scaled-125m"), content, groups, 1)
    check_overlap(load_preset("scaled-125m"), {"zero_optimization": {"stage": 3}}, groups, 1)  # nothing to compare
    compare(torch.zeros(4, 9), torch.zeros(4, 9), 1e-3)
    with pytest.raises(InputError, match="differs by nan%"):
        compare(plain, wrong * torch.nan, 1e-3)


def test_overlap_is_off_where_the_json_says_nothing() -> None:
    small = small_model(load_preset("scaled-125m"), 1)
    for stage in (1, 2, 3):
        resolved = json_config.resolve({"zero_optimization": {"stage": stage}}, small, 1)
        assert DeepSpeedZeroConfig(**resolved["zero_optimization"]).overlap_comm is False


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
