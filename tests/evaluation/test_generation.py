"""Sampling, and prompts of any length."""

import pytest
import torch

from ecp_scale.config import ModelConfig
from ecp_scale.evaluation.generation import generate
from ecp_scale.parallel.groups import Groups
from tests.models.settings import ARCHITECTURES, BOTH, NAMES, SCALED, build, variant

END = 4


@pytest.mark.parametrize("config", BOTH, ids=NAMES)
@pytest.mark.parametrize("length", [1, 7, 8, 33, 100])
def test_greedy_generation_equals_repeated_full_forwards(config: ModelConfig, length: int, groups: Groups) -> None:
    model = build(config, groups)
    ids = torch.randint(29, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    new = list(generate(model, ids, 20, temperature=0))
    expected = list(ids)
    for _ in range(20):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert new == expected[length:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_generates(architecture: str, groups: Groups) -> None:
    model = build(variant(SCALED, architecture), groups)
    n = SCALED.sequence_length
    ids = [5, 7, 11]
    new = list(generate(model, ids, 6, temperature=0, end_of_document=END))
    for count, token in enumerate(new):
        seen = [*ids, *new[:count]]
        padded = seen if model.config.geometry.streams else [END] * (n - len(seen)) + seen
        assert token == int(model.logits(torch.tensor([padded]))[0, -1].argmax())
    assert len(new) == 6


def test_sampling_is_a_function_of_the_seed(groups: Groups) -> None:
    model = build(SCALED, groups)
    draws = [list(generate(model, [1], 30, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_top_one_is_greedy(groups: Groups) -> None:
    model = build(SCALED, groups)
    assert list(generate(model, [1], 10, top_k=1)) == list(generate(model, [1], 10, temperature=0))


def test_an_end_of_document_ends_it(groups: Groups) -> None:
    model = build(SCALED, groups)
    free = list(generate(model, [1], 10, temperature=0))
    assert list(generate(model, [1], 10, temperature=0, end_of_document=free[0])) == []
