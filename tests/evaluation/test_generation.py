"""Sampling, and prompts of any length."""

import math
from collections.abc import Iterator

import pytest
import torch

from ecp_scale.config import ModelConfig
from ecp_scale.data.tokenizer import load_tokenizer
from ecp_scale.data.tokenizer_kinds import ByteTokenizer
from ecp_scale.evaluation.continuation import pieces_of_text
from ecp_scale.evaluation.generation import Sampling, generate
from ecp_scale.parallel.groups import Groups
from tests.corpus import ShardedText
from tests.models.settings import ARCHITECTURES, BOTH, NAMES, SCALED, build, variant

END = 4
GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("config", BOTH, ids=NAMES)
@pytest.mark.parametrize("length", [1, 7, 8, 33, 100])
def test_greedy_generation_equals_repeated_full_forwards(config: ModelConfig, length: int, groups: Groups) -> None:
    model = build(config, groups)
    ids = torch.randint(29, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    new = list(generate(model, ids, 20, GREEDY))
    expected = list(ids)
    for _ in range(20):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert new == expected[length:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_generates(architecture: str, groups: Groups) -> None:
    model = build(variant(SCALED, architecture), groups)
    n = SCALED.sequence_length
    ids = [5, 7, 11]
    new = list(generate(model, ids, 6, GREEDY, end_of_document=END))
    for count, token in enumerate(new):
        seen = [*ids, *new[:count]]
        padded = seen if model.config.geometry.streams else [END] * (n - len(seen)) + seen
        assert token == int(model.logits(torch.tensor([padded]))[0, -1].argmax())
    assert len(new) == 6


def test_sampling_is_a_function_of_the_seed(groups: Groups) -> None:
    model = build(SCALED, groups)
    draws = [list(generate(model, [1], 30, Sampling(seed=seed))) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_top_one_is_greedy(groups: Groups) -> None:
    model = build(SCALED, groups)
    assert list(generate(model, [1], 10, Sampling(top_k=1))) == list(generate(model, [1], 10, GREEDY))


def test_an_end_of_document_ends_it(groups: Groups) -> None:
    model = build(SCALED, groups)
    free = list(generate(model, [1], 10, GREEDY))
    assert list(generate(model, [1], 10, GREEDY, end_of_document=free[0])) == []


def distribution(sampling: Sampling, scores: list[float], seen: list[int]) -> dict[int, float]:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(1)
    were_there = torch.tensor([token in seen for token in range(len(scores))])
    draws = [sampling.choose(torch.tensor(scores), were_there, generator) for _ in range(3000)]
    return {token: draws.count(token) / len(draws) for token in sorted(set(draws))}


def test_what_is_sampled_has_the_probabilities_that_were_asked_for() -> None:
    scores = [math.log(p) for p in (0.1, 0.5, 0.3, 0.1)]
    for sampling, expected in (
        (Sampling(), {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.1}),
        (Sampling(top_k=2), {1: 0.625, 2: 0.375}),
        (Sampling(top_p=0.79), {1: 0.625, 2: 0.375}),
        (Sampling(top_p=0.4), {1: 1.0}),
        (Sampling(min_p=0.5), {1: 0.625, 2: 0.375}),
        (Sampling(temperature=0.5), {0: 1 / 36, 1: 25 / 36, 2: 9 / 36, 3: 1 / 36}),
    ):
        assert distribution(sampling, scores, []) == pytest.approx(expected, abs=0.03)
    # Scores of what was there: positive ones are divided, negative ones multiplied.
    assert distribution(Sampling(repetition_penalty=2.0), [2.0, 1.0, -1.0], [0, 2]) == pytest.approx(
        {0: math.e / (2 * math.e + math.exp(-2)), 1: math.e / (2 * math.e + math.exp(-2)), 2: 0.024}, abs=0.03
    )


def test_text_comes_in_pieces_that_no_later_token_changes() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("é 漢字, end of it")
    pieces = list(pieces_of_text(tokenizer, [256], ids))
    assert "".join(pieces) == "é 漢字, end of it"
    assert pieces[:3] == ["é", " ", "漢"]
    asked = []

    def new() -> Iterator[int]:
        for token in ids:
            asked.append(token)
            yield token

    assert "".join(pieces_of_text(tokenizer, [256], new(), ["d o", "of"])) == "é 漢字, en"
    assert len(asked) == len("é 漢字, end o".encode())
    assert "".join(pieces_of_text(tokenizer, [256], ids[:1])) == "\N{REPLACEMENT CHARACTER}"


def test_pieces_of_a_sentencepiece_model_keep_their_spaces(sharded_text: ShardedText) -> None:
    tokenizer = load_tokenizer(f"sentencepiece:{sharded_text.tokenizer}")
    text = "import os\n\nfor name in os.listdir():  # a ▁ sign, ünïcödé\n"
    ids = tokenizer.encode(text)
    for border in (0, 1, 3, len(ids) - 1):
        prompt = [tokenizer.end_of_document, *ids[:border]]
        expected = tokenizer.decode(ids)[len(tokenizer.decode(ids[:border])) :]
        assert "".join(pieces_of_text(tokenizer, prompt, ids[border:])) == expected
