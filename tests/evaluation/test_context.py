"""Loss by position and by context, against one token at a time; and that from the receptive field on nothing is cut."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ecp_scale.errors import InputError
from ecp_scale.evaluation import context
from ecp_scale.evaluation.context import bootstrap_error, by_context, by_position
from ecp_scale.evaluation.perplexity import Text
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.groups import Groups
from tests.corpus import ShardedText
from tests.launching import run, run_successfully
from tests.models.settings import SCALED, build
from tests.parallel.layouts import Layout, trained

END = 28


def model_of(groups: Groups, architecture: str = "ecp", layers: int = 2) -> LanguageModel:
    """A random model of 32 tokens in segments of 8, in float64."""
    config = dataclasses.replace(
        SCALED,
        architecture=architecture,
        layers=layers,
        sequence_length=32,
        segment_length=8,
        latents=12,
        group_length=16,
        window=12,
        allow_short_receptive_field=True,
    )
    return build(config, groups, torch.float64).eval()


def text_of(tokens: int, seed: int = 3) -> Text:
    """Random ids with some ends of documents."""
    return Text(np.random.default_rng(seed).integers(0, 29, tokens), tokens, tokens)


def losses_one_by_one(model: LanguageModel, ids: list[int], starts: list[int]) -> list[float]:
    """Loss of the target behind each position, where the model reads from a place on of its own."""
    found = []
    for place, start in enumerate(starts):
        logits = model.logits(torch.tensor([ids[start : place + 1]]))[0, -1]
        found.append(-logits.log_softmax(-1)[ids[place + 1]].item())
    return found


@pytest.mark.parametrize("seen", [3, 8, 16, 20, 24])
def test_no_token_sees_more_than_it_may_and_none_less_than_half(seen: int, groups: Groups) -> None:
    model, text = model_of(groups), text_of(75)
    ids = [END, *text.ids[:].tolist()]
    # Segments lie as in the uncut text where they fit; else windows begin anywhere.
    border = 8 if seen >= 16 else 1
    stride = border if border > 1 else max(1, seen // 4)
    ends = [min(place // stride * stride + stride, 75) for place in range(75)]
    starts = [max(0, math.ceil((place // stride * stride + stride - seen) / border) * border) for place in range(75)]
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        assert end - start <= seen
        assert place + 1 - start >= min(place + 1, (seen - seen % border) / 2)
    expected = np.mean(losses_one_by_one(model, ids, starts))
    cut, uncut = by_context(model, text, END, [seen])
    assert cut.nll == pytest.approx(expected, abs=1e-6)
    assert cut.difference == pytest.approx(cut.nll - uncut.nll, abs=1e-6)
    whole = np.mean(losses_one_by_one(model, ids, [0] * 75))
    assert uncut.nll == pytest.approx(whole, abs=1e-6)


def test_from_the_receptive_field_on_nothing_is_cut(groups: Groups) -> None:
    model, text = model_of(groups, layers=3), text_of(300)
    field = model.config.receptive_field_tokens
    assert field == 32
    *found, uncut = by_context(model, text, END, [8, 16, 32, 40, 96])
    assert [abs(one.difference) < 1e-7 for one in found] == [False, False, True, True, True]
    assert all(one.error is not None and one.error < 1e-6 for one in found[2:])
    assert uncut.context is None


@pytest.mark.parametrize("architecture", ["transformer", "sliding_window", "longlora"])
def test_other_causal_architectures_are_cut_too(architecture: str, groups: Groups) -> None:
    found = by_context(model_of(groups, architecture), text_of(100), END, [4, 32])
    assert abs(found[0].difference) > 1e-4
    assert [one.context for one in found] == [4, 32, None]
    with pytest.raises(InputError, match="expected 1 to"):
        by_context(model_of(groups, "transformer"), text_of(100), END, [4, 33])


def test_what_cannot_be_cut_is_said(groups: Groups) -> None:
    with pytest.raises(InputError, match="the context of perceiver_ar is not causal, so it cannot be cut"):
        by_context(model_of(groups, "perceiver_ar"), text_of(100), END, [8])
    with pytest.raises(InputError, match="--context 1000: expected 1 to 100"):
        by_context(model_of(groups), text_of(100), END, [8, 1000])
    with pytest.raises(InputError, match=r"needs a window of 32 \+ 1 tokens, the text has 21"):
        by_position(model_of(groups), text_of(20), END)


@pytest.mark.parametrize("architecture", ["ecp", "perceiver_ar"])
@pytest.mark.parametrize("batch_tokens", [1, 70, 8192])
def test_the_loss_by_position_is_the_mean_over_windows(
    architecture: str, batch_tokens: int, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "BATCH_TOKENS", batch_tokens)
    model, text = model_of(groups, architecture), text_of(3 * 32 + 5)
    ids = torch.tensor([END, *text.ids[:].tolist()])
    rows = torch.stack([ids[start : start + 33] for start in (0, 32, 64)])
    scores = model.logits(rows[:, :-1]).log_softmax(-1)
    first = 32 - scores.shape[1]
    losses = -scores.gather(-1, rows[:, 1 + first :, None])[..., 0]
    found = by_position(model, text, END)
    whole = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    assert [(one.first, one.last) for one in found] == (whole if first == 0 else [(20, 31)])
    for one in found:
        means = losses[:, one.first - first : one.last + 1 - first].mean(1)
        assert one.nll == pytest.approx(means.mean().item(), abs=1e-6)
        assert one.error == pytest.approx(means.std().item() / math.sqrt(3), abs=1e-6)


def test_the_error_is_that_of_blocks_and_not_of_tokens() -> None:
    rng = np.random.default_rng(1)
    # Tokens of a block share what moves them, as those of a document do.
    shared = rng.normal(0, 1, 200)
    values = (np.repeat(shared, 50) + rng.normal(0, 1, 10_000)).astype(np.float32)
    blocks = np.repeat(np.arange(200, dtype=np.int32), 50)
    expected = values.reshape(200, 50).mean(1).std(ddof=1) / math.sqrt(200)
    assert expected > 4 * values.std() / math.sqrt(10_000)
    assert bootstrap_error(values, blocks) == pytest.approx(expected, rel=0.1)
    assert bootstrap_error(values, np.zeros(10_000, dtype=np.int32)) is None


def test_blocks_end_with_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    from ecp_scale.evaluation.perplexity import Prefixed

    monkeypatch.setattr(context, "BLOCK_TOKENS", 3)
    ids = Prefixed(np.array([1, 2, 3, 4, END, 5, END, 6, 7]), END, 1)
    assert context._blocks(ids, END).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_the_program_prints_writes_and_draws(sharded_text: ShardedText, tmp_path: Path) -> None:
    run_successfully(
        *("launch/convert_checkpoint.py", "--checkpoint", trained(Layout(), sharded_text)),
        *("--output", tmp_path / "model"),
    )
    (tmp_path / "text.txt").write_text(sharded_text.documents[0][:6000])
    words = ["launch/evaluate.py", "--model", tmp_path / "model", "--data", tmp_path / "text.txt"]
    found = run_successfully(
        *words,
        *("--by-position", "--context", "16,48,640", "--plot", tmp_path / "loss.png", "--json", tmp_path / "x.json"),
    )
    content = json.loads((tmp_path / "x.json").read_text())
    assert [one["context"] for one in content["by_context"]] == [16, 48, 640, None]
    assert content["by_position"][-1]["last"] == 63
    assert "context               640" in found
    assert "(from the receptive field on)" in found
    per_token = math.log(content["token_perplexity"])
    assert content["protocol"] == "stream"
    assert content["by_context"][-1]["nll"] == pytest.approx(per_token, abs=1e-5)
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    for more, message in (
        (["--context", "8,x"], "--context is '8,x', expected numbers"),
        (["--plot", "x.png"], "expected one of them"),
        (["--by-position", "--plot", "x.txt"], "expected a name that ends in .png"),
    ):
        refused = run(*words, *more)
        assert refused.returncode == 2
        assert message in refused.stderr
