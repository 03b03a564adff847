"""The result: each protocol against a plain forward, and the units against each other."""

import dataclasses
import math
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ecp_scale.config import AttentionConfig
from ecp_scale.errors import InputError
from ecp_scale.evaluation import perplexity
from ecp_scale.evaluation.perplexity import EvaluationResult, Part, Text, default_protocol, evaluate, unigram_result
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.groups import Groups
from tests.models.settings import ARCHITECTURES, BOTH, LATENT, NAMES, PAPER, SCALED, build, variant

END = 1
LENGTH = 101


@pytest.fixture(scope="module")
def text() -> Text:
    ids = np.random.default_rng(1).integers(0, 29, LENGTH)
    return Text(ids, bytes=300, words=50)


def plain_losses(model: LanguageModel, ids: list[int]) -> list[float]:
    """NLL of every id but the first, by one full forward."""
    logits = model.logits(torch.tensor([ids[:-1]]))[0].float()
    return [-logits[i].log_softmax(-1)[ids[i + 1]].item() for i in range(len(ids) - 1)]


def test_stream_equals_one_forward_over_everything(groups: Groups, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SCALED, groups)
    expected = sum(plain_losses(model, [END, *text.ids.tolist()]))
    for chunk in (8, 40, 4096):
        monkeypatch.setattr(perplexity, "STREAM_CHUNK_TOKENS", chunk)
        result = evaluate(model, text, END, "stream")
        assert result.tokens_scored == LENGTH
        assert result.nll == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("config", BOTH, ids=NAMES)
def test_sliding_scores_every_token_once_with_half_a_window_of_context(
    config: object, groups: Groups, text: Text
) -> None:
    model = build(config, groups)
    n = model.config.sequence_length
    ids = [END, *text.ids.tolist()]
    expected = {}
    for end in [n, *range(n + n // 2, LENGTH + 1, n // 2), LENGTH]:
        for position, loss in zip(
            range(end - n + 1, end + 1), plain_losses(model, ids[end - n : end + 1]), strict=True
        ):
            expected.setdefault(position, loss)
    result = evaluate(model, text, END, "sliding")
    assert result.tokens_scored == len(expected) == LENGTH
    assert result.nll == pytest.approx(sum(expected.values()), rel=1e-6)


def test_release_drops_the_tail_and_scores_every_position_of_every_window(groups: Groups, text: Text) -> None:
    model = build(PAPER, groups)
    n = PAPER.sequence_length
    ids = [END, *text.ids.tolist()]
    windows = [ids[start : start + n + 1] for start in range(0, len(ids) - n, n // 2)]
    means = [np.mean(plain_losses(model, window)) for window in windows]
    result = evaluate(model, text, END, "release")
    assert result.tokens_scored == n * len(windows)
    assert result.nll_per_token == pytest.approx(np.mean(means), rel=1e-6)


@pytest.mark.parametrize("protocol", ["stream", "sliding", "release"])
@pytest.mark.parametrize("replicas", [2, 7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_of_replicas_are_the_whole(
    protocol: str, replicas: int, architecture: str, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "STREAM_CHUNK_TOKENS", 40)
    model = build(variant(SCALED, architecture), groups)
    if protocol == "stream" and not model.config.geometry.bounded_cache:
        return
    ids = perplexity.Prefixed(np.random.default_rng(5).integers(0, 29, 10 * LENGTH), END, 1)
    score = {"stream": perplexity.stream_losses, "sliding": perplexity._sliding, "release": perplexity._release}[
        protocol
    ]
    whole = torch.cat(list(score(model, ids, Part())))
    parts = [list(score(model, ids, Part(number, replicas))) for number in range(replicas)]
    if protocol == "stream":
        found = torch.cat([losses for part in parts for losses in part])
    else:
        found = torch.cat([losses for window in zip_longest(*parts) for losses in window if losses is not None])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_replicas_share_documents_unless_absolute_positions_restart_in_them(groups: Groups) -> None:
    ids = perplexity.Prefixed(np.random.default_rng(6).integers(0, 9, 5 * LENGTH), END, 1)
    for config in BOTH:
        model = build(config, groups, attention=AttentionConfig(document_mask=True, end_of_document=END))
        whole = torch.cat(list(perplexity.stream_losses(model, ids, Part())))
        parts = [losses for rank in range(3) for losses in perplexity.stream_losses(model, ids, Part(rank, 3))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    restarted = AttentionConfig(document_mask=True, restart_positions=True, end_of_document=END)
    model = build(SCALED, groups, attention=restarted)
    whole = torch.cat(list(perplexity.stream_losses(model, ids, Part())))
    parts = [losses for rank in range(3) for losses in perplexity.stream_losses(model, ids, Part(rank, 3))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    three = SimpleNamespace(rank=lambda: 0, size=lambda: 3)
    with pytest.raises(InputError, match="depends on all that came before, so 3 replicas cannot share a text"):
        evaluate(build(PAPER, groups, attention=restarted), Text(ids.ids, 9, 9), END, "stream", replicas=three)


@pytest.mark.parametrize("architecture", LATENT)
@pytest.mark.parametrize("latents", [16, 8])
def test_latent_models_score_every_token_once_with_a_full_context(
    architecture: str, latents: int, groups: Groups, text: Text
) -> None:
    model = build(variant(PAPER, architecture, latents=latents), groups)
    n = model.config.sequence_length
    ids = torch.tensor([END] * (n - latents) + [END, *text.ids.tolist()])
    expected = 0.0
    for position in range(n - latents + 1, len(ids)):
        # Windows move by the latents; the last one ends with the text.
        end = min(n + -(-max(0, position - n) // latents) * latents, len(ids) - 1)
        row = position - (end - n) - 1 - (n - latents)
        logits = model.logits(ids[None, end - n : end])[0, row].float()
        expected -= logits.log_softmax(-1)[ids[position]].item()
    result = evaluate(model, text, END, "sliding")
    assert result.tokens_scored == LENGTH
    assert result.nll == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match=r"the context of .* is not causal; use sliding"):
        evaluate(model, text, END, "stream")


def test_a_model_evaluates_with_another_geometry(groups: Groups, text: Text) -> None:
    for architecture in ARCHITECTURES:
        trained = variant(SCALED, architecture, segment_length=8, latents=16)
        weights = build(trained, groups).state_dict()
        changed = dataclasses.replace(trained, sequence_length=48, segment_length=4, latents=32, window=5)
        model = build(changed, groups)
        model.load_state_dict(weights)
        assert evaluate(model, text, END, "sliding").tokens_scored == LENGTH


def test_the_default_protocol_needs_relative_positions_and_bounded_memory_to_stream() -> None:
    assert default_protocol(SCALED) == "stream"
    assert default_protocol(PAPER) == "sliding"
    streaming = {name for name in ARCHITECTURES if default_protocol(variant(SCALED, name)) == "stream"}
    assert streaming == {"ecp", "sliding_window", "longlora"}


def test_short_texts(groups: Groups) -> None:
    model = build(PAPER, groups)
    short = Text(np.array([3, 4, 5]), bytes=9, words=2)
    assert evaluate(model, short, END, "sliding").nll == pytest.approx(
        sum(plain_losses(model, [END, 3, 4, 5])), rel=1e-6
    )
    with pytest.raises(InputError, match="needs a window of 32"):
        evaluate(model, short, END, "release")
    with pytest.raises(InputError, match="no words"):
        evaluate(model, dataclasses.replace(short, words=0), END, "sliding")


@pytest.mark.parametrize("architecture", LATENT)
@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 40])
def test_a_text_shorter_than_the_latents_is_scored_without_padding(
    architecture: str, length: int, groups: Groups
) -> None:
    model = build(variant(PAPER, architecture, latents=16), groups)
    ids = np.random.default_rng(length).integers(3, 29, length)
    result = evaluate(model, Text(ids, bytes=99, words=9), END, "sliding")
    assert result.tokens_scored == length
    if length <= 16:
        window = torch.tensor([[END] * (32 - length) + [END, *ids.tolist()]])
        logits = model.logits(window[:, :-1])[0, -length:].float()
        expected = torch.nn.functional.cross_entropy(logits, window[0, -length:], reduction="sum")
        assert result.nll == pytest.approx(expected.item(), rel=1e-6)


def test_units() -> None:
    result = EvaluationResult("stream", nll=200.0, tokens_scored=100, tokens=100, bytes=400, words=80)
    assert result.token_perplexity == pytest.approx(math.exp(2))
    assert result.word_perplexity == pytest.approx(math.exp(2.5))
    assert result.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert result.tokens_per_word == 1.25
    with_lines = dataclasses.replace(result, lines=20)
    assert with_lines.word_perplexity == result.word_perplexity
    assert with_lines.word_and_line_end_perplexity == pytest.approx(math.exp(2))


def test_a_perplexity_is_what_it_is_however_large() -> None:
    assert EvaluationResult(
        "stream", nll=705.0, tokens_scored=1, tokens=1, bytes=1, words=1
    ).word_perplexity == math.exp(705)
    assert (
        EvaluationResult("stream", nll=5000.0, tokens_scored=1, tokens=1, bytes=1, words=1).word_perplexity == math.inf
    )


def test_figures_of_what_a_vocabulary_cannot_write_do_not_compare() -> None:
    result = EvaluationResult("stream", nll=1.0, tokens_scored=1000, tokens=1000, bytes=10_000, words=900, unknown=1)
    assert result.is_comparable
    assert not dataclasses.replace(result, unknown=2).is_comparable
    assert dataclasses.replace(result, unknown=2).unknown_share == 0.002


def test_unigram_is_the_entropy_of_smoothed_counts() -> None:
    result = unigram_result(Text(np.array([0, 0, 1]), bytes=3, words=1), np.array([3, 1, 0]))
    assert result.nll == pytest.approx(-2 * math.log(4 / 7) - math.log(2 / 7))
