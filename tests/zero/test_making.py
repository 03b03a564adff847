"""A model that begins as the parts that ranks hold of it."""

import dataclasses
import json
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch

from ecp_scale.errors import InputError
from ecp_scale.models.initialization import Constant, Normal, Uniform, Values, fill, initialize, stream_key
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.partition import Held, Partition
from ecp_scale.zero import json_config
from ecp_scale.zero.engine import build_engine
from ecp_scale.zero.making import check_host_memory
from tests.launching import ROOT, environment
from tests.models.settings import SCALED, build
from tests.zero.test_few_kernels import config as small_run

GIB = 1 << 30


def drawn(shape: list[int], partition: Partition, size: int, rank: int, values: Values, start: int = 0) -> torch.Tensor:
    """The elements of a rank's share from ``start`` on."""
    out = torch.full((math.prod(shape) - start,), math.nan)
    fill(Held(out, shape, start), partition.share(shape, size, rank), values, stream_key(1, "a.weight"))
    return out


@pytest.mark.parametrize("values", [Normal(0.5), Uniform(0.5), Constant(0.5)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_every_layout_draws_the_same_elements(values: Values, dim: int | None) -> None:
    shape, size = [24, 60_003 if dim == 0 else 60_000], 4  # more than a chunk; odd rows begin inside a word
    partition = Partition(dim)
    whole = drawn(shape, partition, 1, 0, values).view(shape)
    for rank in range(size):
        expected = partition.split(whole, size, rank, shape[0])
        share = list(expected.shape)
        assert torch.equal(drawn(share, partition, size, rank, values).view(share), expected)
        # A run of the share, as ZeRO-3 holds it, the last one padded.
        for start in (1, 4_321, expected.numel() - 5):
            assert torch.equal(drawn(share, partition, size, rank, values, start), expected.flatten()[start:])
    padded = torch.full((10,), math.nan)
    last = whole.numel() - 7
    fill(Held(padded, shape, last), partition.share(shape, 1, 0), values, stream_key(1, "a.weight"))
    assert torch.equal(padded[:7], whole.flatten()[last:])
    assert isinstance(values, Constant) or not padded[7:].any()


def test_padding_of_the_vocabulary_is_zero_and_changes_nothing_else() -> None:
    partition = Partition(0, vocabulary_rows=7)
    padded = [drawn([4, 5], partition, 2, rank, Normal(1.0)) for rank in range(2)]
    whole = drawn([7, 5], partition, 1, 0, Normal(1.0))
    assert torch.equal(torch.cat(padded)[: len(whole)], whole)
    assert not padded[1][15:].any()


@pytest.mark.parametrize(
    ("values", "moments"), [(Normal(1.0), (0.0, 1.0, 0.0, 3.0)), (Uniform(math.sqrt(3)), (0.0, 1.0, 0.0, 9 / 5))]
)
def test_what_is_drawn_is_distributed_as_it_says(values: Values, moments: tuple[float, ...]) -> None:
    z = drawn([1000, 1000], Partition(0), 1, 0, values).double()
    for power, moment in enumerate(moments, start=1):
        assert (z**power).mean().item() == pytest.approx(moment, abs=0.03)
    # Neighbours share a word; parameters and seeds have streams of their own.
    for lag in (1, 2, 1000):
        assert abs((z[:-lag] * z[lag:]).mean().item()) < 0.005
    other = torch.empty(len(z))
    for key in (stream_key(2, "a.weight"), stream_key(1, "b.weight")):
        fill(Held(other, [1000, 1000], 0), Partition(0).share([1000, 1000], 1, 0), values, key)
        assert abs((z * other.double()).mean().item()) < 0.005


@pytest.mark.parametrize("rule", ["normal", "depth_scaled", "pytorch"])
def test_matrices_norms_and_biases_begin_as_the_rule_says(rule: str, groups: Groups) -> None:
    config = dataclasses.replace(SCALED, initialization=rule, bias=True, width=96, feed_forward_width=384)
    model = build(config, groups)
    initialize(model, config, model.parallel, seed=3)
    found = dict(model.named_parameters())
    assert torch.equal(found["norm.weight"], torch.ones_like(found["norm.weight"]))
    up, down = found["layers.0.feed_forward.up.weight"], found["layers.0.feed_forward.down.weight"]
    if rule == "pytorch":
        assert up.std().item() == pytest.approx(1 / math.sqrt(3 * 96), rel=0.03)
        assert up.abs().max().item() <= 1 / math.sqrt(96)
        assert found["embedding.weight"].std().item() == pytest.approx(1, rel=0.05)
        return
    assert not found["layers.0.feed_forward.down.bias"].any()
    assert up.std().item() == pytest.approx(0.02, rel=0.03)
    depth = math.sqrt(2 * config.layers) if rule == "depth_scaled" else 1
    assert down.std().item() == pytest.approx(0.02 / depth, rel=0.03)


def test_a_resume_draws_nothing(groups: Groups) -> None:
    config = small_run(1.0)
    settings = json_config.resolve({"zero_optimization": {"stage": 1}}, config, 1)
    with mock.patch("ecp_scale.models.initialization.Philox", side_effect=AssertionError("drawn")):
        build_engine(config, settings, groups, draw=False).destroy()
        with pytest.raises(AssertionError, match="drawn"):
            build_engine(config, settings, groups)


def test_states_that_do_not_fit_into_the_host_are_refused(groups: Groups) -> None:
    config = small_run(1.0)
    settings = json_config.resolve({"zero_optimization": {"stage": 1}}, config, 1)
    check_host_memory(config, settings, groups, 1)
    with pytest.raises(InputError, match=r"GiB of memory free, and the states of its 1000000000 ranks need [\d.]+ GiB"):
        check_host_memory(config, settings, groups, 1_000_000_000)


@pytest.mark.parametrize(("stage", "parts"), [(1, 8), (3, 256)])
def test_a_rank_of_a_model_of_billions_starts_in_little_more_than_its_weights(stage: int, parts: int) -> None:
    """Really built: 1.3 billion parameters in 8 tensor shares, 30 in 256 runs of ZeRO-3; other ranks are played."""
    preset = {1: "scaled-1b3", 3: "scaled-30b"}[stage]
    layout = ["--parallel.tensor=1"] if stage == 3 else ["--parallel.tensor=8"]
    words = [*layout, "--parallel.context=1", "--parallel.sequence=false"]
    words += ["--training.micro_batch_size=1", "--training.global_batch_size=256"]
    started = [sys.executable, "-m", "tests.zero.build_rank", preset, "256", str(stage), *words]
    done = subprocess.run(started, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["held_bytes"] == pytest.approx(2 * found["parameters"] / parts, rel=0.01)
    assert found["grown_bytes"] < found["held_bytes"] + GIB // 8
