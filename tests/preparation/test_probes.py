"""Probes: every answer stands where it is said to, one text is one window, and accuracy is counted by distance."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecp_scale.config import ModelConfig
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.marks import plain
from ecp_scale.data.tokenizer import ByteTokenizer
from ecp_scale.errors import InputError
from ecp_scale.evaluation.probing import accuracies, check_length, read_probes
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.groups import Groups
from ecp_scale.preparation.probes import ANSWERS, Probe, Task, chance, longest, probes, shortest
from tests.launching import run, run_successfully
from tests.models.settings import build

TASKS: tuple[Task, ...] = ("copy", "recall", "passkey")


def source_of(probe: Probe, text: str, symbol: int) -> str:
    """The symbol that stands ``distance`` tokens before the position that predicts one of the answer."""
    predicts = len(probe.prompt) - 1 + symbol
    return text[predicts - probe.distance]


@given(task=st.sampled_from(TASKS), length=st.integers(40, 300), seed=st.integers(0, 99), data=st.data())
def test_every_symbol_of_an_answer_stands_at_its_distance(
    task: Task, length: int, seed: int, data: st.DataObject
) -> None:
    distances = data.draw(st.lists(st.integers(shortest(task), longest(task, length)), min_size=1, max_size=3))
    found = list(probes(task, length, distances, 5, seed))
    assert [probe.distance for probe in found] == [distances[i % len(distances)] for i in range(5)]
    for probe in found:
        text = probe.prompt + probe.answer
        assert len(text) == length - 1
        assert "".join(source_of(probe, text, symbol) for symbol in range(ANSWERS[task])) == probe.answer
        if task == "recall":  # the last letter, whose pair stands nowhere else
            assert probe.prompt.count(probe.prompt[-1]) == 2
        else:
            assert probe.prompt.count(probe.answer) == 1


def test_probes_are_the_same_whatever_their_count() -> None:
    few, many = (list(probes("copy", 64, [14, 40], count, 3)) for count in (4, 9))
    assert many[:4] == few
    assert few != list(probes("copy", 64, [14, 40], 4, 4))
    assert [chance(task) for task in TASKS] == [1 / 26, 1 / 10, 1 / 10]


@pytest.mark.parametrize("task", TASKS)
def test_the_ends_of_the_range_fit_and_what_lies_beyond_is_refused(task: Task) -> None:
    least, most = shortest(task), longest(task, 64)
    assert len(list(probes(task, 64, [least, most], 2, 1))) == 2
    for beyond in (least - 1, most + 1):
        with pytest.raises(InputError, match=f"distances {beyond} of {task} do not fit .* expected {least} to {most}"):
            list(probes(task, 64, [beyond], 1, 1))


def test_one_text_is_one_window_whose_answer_alone_has_a_loss(tmp_path: Path) -> None:
    words = ["--task=passkey", "--length=64", "--distances=8,16,40", "--count=30"]
    prefix = tmp_path / "probe"
    assert "30 texts of 64 tokens" in run_successfully("data_tools/make_probe.py", *words, "--output-prefix", prefix)
    corpus = Corpus(str(prefix), 64)
    read = read_probes(tmp_path / "probe.jsonl")
    check_length(tmp_path / "probe.jsonl", read, ByteTokenizer(), 64)
    for number in range(corpus.windows):
        window = corpus.window(number)
        assert bytes(plain(window)[:63].tolist()).decode() == read[number].prompt + read[number].answer
        # Of the targets: the answer and the end; the first token of the next text is a prompt's.
        assert np.flatnonzero(window[1:] >= 0).tolist() == [58, 59, 60, 61, 62]
    again = run("data_tools/make_probe.py", *words, "--output-prefix", prefix)
    assert again.returncode == 2
    assert "probe.jsonl exists already" in again.stderr
    for wrong, message in (
        ("--distances=8,x", "expected numbers separated by commas"),
        ("--distances=1000", "expected 5 to 57"),
        ("--count=0", "0 probes at 3 distances"),
    ):
        done = run("data_tools/make_probe.py", *words, wrong, "--output-prefix", tmp_path / "other")
        assert done.returncode == 2
        assert message in done.stderr
    assert not list(tmp_path.glob("other*"))


def test_what_is_no_probe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(InputError, match=r"x\.jsonl: No such file"):
        read_probes(path)
    path.write_text("")
    with pytest.raises(InputError, match="no probes"):
        read_probes(path)
    good = json.dumps(next(probes("copy", 64, [20], 1, 1)).record)
    path.write_text(good + "\n{}\n")
    with pytest.raises(InputError, match=r"line 2: not a probe of ecp-make-probe"):
        read_probes(path)
    path.write_text(good + "\n")
    with pytest.raises(InputError, match=r"a probe has 64 tokens .* model\.sequence_length is 32"):
        check_length(path, read_probes(path), ByteTokenizer(), 32)


MODEL = ModelConfig(
    layers=2,
    width=16,
    heads=2,
    feed_forward_width=32,
    sequence_length=64,
    segment_length=8,
    vocab_size=257,
    allow_short_receptive_field=True,
)


class Codes(ByteTokenizer):
    """Every id is the character of that number, so that any answer of a model is a text."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def greedy(model: LanguageModel, probe: Probe) -> str:
    """The answer that a model gives, symbol by symbol."""
    answer = [0] * len(probe.answer)
    for place in range(len(answer)):
        ids = torch.tensor([[*Codes().encode(probe.prompt), *answer, 256]])
        answer[place] = int(model.logits(ids)[0, place - len(answer) - 2].argmax())
    return "".join(map(chr, answer))


@pytest.mark.parametrize("architecture", ["ecp", "perceiver_ar"])
def test_accuracy_counts_what_a_model_says_first(architecture: Any, groups: Groups) -> None:
    config = dataclasses.replace(MODEL, architecture=architecture, latents=16)
    model = build(config, groups, torch.float32).eval()
    asked = list(probes("passkey", 64, [8, 40], 24, 1))
    # Six answers at distance 8 are made right, and two at 40; of one more the last symbol is wrong.
    asked[::4] = [dataclasses.replace(probe, answer=greedy(model, probe)) for probe in asked[::4]]
    asked[1:5:2] = [dataclasses.replace(probe, answer=greedy(model, probe)) for probe in asked[1:5:2]]
    said = greedy(model, asked[9])
    asked[9] = dataclasses.replace(asked[9], answer=said[:3] + chr((ord(said[3]) + 1) % 257))
    near, far = accuracies(model, Codes(), asked, batch=5)
    assert (near.distance, near.symbols, near.answers, far.distance) == (8, 48, 12, 40)
    assert near.right_answers == 6 <= near.right_symbols / 4
    assert far.right_answers == 2 <= (far.right_symbols - 3) / 4


def test_beyond_the_receptive_field_an_answer_cannot_depend_on_its_source(groups: Groups) -> None:
    model = build(MODEL, groups, torch.float32).eval()
    field = MODEL.receptive_field_tokens
    assert field == 24

    def logits(distance: int, seed: int) -> torch.Tensor:
        (probe,) = probes("passkey", 64, [distance], 1, seed)
        # The question alone differs by its source; the answers, which come later, are the same.
        ids = [*ByteTokenizer().encode(probe.prompt), *b"0000", 256]
        return model.logits(torch.tensor([ids]))[0, -6:-2]

    assert torch.equal(logits(field, 1), logits(field, 2))
    assert not torch.equal(logits(field - 8, 1), logits(field - 8, 2))
