"""Validation on several corpora: their losses, bits per byte and losses by position, in every layout and by hand."""

import math
from pathlib import Path

import pytest
import torch

from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.command_line import parse
from ecp_scale.data.corpus import Corpus
from ecp_scale.errors import InputError
from ecp_scale.models.positions import bucket_of, buckets
from ecp_scale.training.loop import train
from ecp_scale.training.trackers import scalars
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout


def words(layout: Layout, text: ShardedText, run: Path, *more: str) -> list[str]:
    """A short run that validates at its end, on one corpus under two names."""
    named = f"--data.validation={{same: {text.prefix}, again: {text.prefix}}}"
    fields = ("--training.validation_windows=5", "--training.micro_batch_size=2", *more)
    return [*map(str, layout.options(text, run)), named, "--training.steps=2", *fields]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64, 100])
def test_buckets_hold_every_position_once(n: int) -> None:
    found = buckets(n)
    assert [place for first, last in found for place in range(first, last + 1)] == list(range(n))
    for position in range(n):
        first, last = found[bucket_of(position)]
        assert first <= position <= last


@pytest.mark.parametrize("architecture", ["ecp", "perceiver_ar"])
def test_every_corpus_has_its_figures(architecture: str, sharded_text: ShardedText, tmp_path: Path) -> None:
    settings = "paper" if architecture == "perceiver_ar" else "scaled"
    layout = Layout(architecture=architecture, settings=settings)
    train(parse(words(layout, sharded_text, tmp_path / "run"), ""))
    first, last = metrics(tmp_path / "run")
    assert not any(key.startswith("validation") for key in first)
    for key in ("validation_loss", "validation_bits_per_byte", "validation_by_position"):
        assert last[key] == last[f"{key}/same"] == last[f"{key}/again"]

    export(find_checkpoint(tmp_path / "run"), tmp_path / "model")
    model = ExportedModel.open(tmp_path / "model").load()
    corpus = Corpus(sharded_text.prefix, 64)

    rows = torch.stack([torch.from_numpy(corpus.window(number)) for number in range(5)])
    losses = model(rows[:, :-1], rows[:, 1:])[1]
    missing = 64 - losses.shape[1]
    assert (missing > 0) == (architecture == "perceiver_ar")
    assert last["validation_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    by_hand = []
    for begin, end in buckets(64):
        part = losses[:, max(0, begin - missing) : max(0, end + 1 - missing)]
        if part.numel():
            by_hand.append([begin, end, pytest.approx(part.mean().item(), rel=1e-5)])
    assert last["validation_by_position"] == by_hand
    totals = corpus.manifest.totals
    bits = last["validation_loss"] * totals.tokens / totals.bytes / math.log(2)
    assert last["validation_bits_per_byte"] == pytest.approx(bits)
    said = scalars(last)
    assert said["validation_by_position/same/from_000032"] == last["validation_by_position"][-1][2]
    assert not any(isinstance(value, list) for value in said.values())


def test_ranks_that_share_sequences_and_texts_find_the_same(sharded_text: ShardedText, tmp_path: Path) -> None:
    train(parse(words(Layout(), sharded_text, tmp_path / "alone"), ""))
    layout = Layout(context=2)
    run_successfully("launch/pretrain_ecp.py", *words(layout, sharded_text, tmp_path / "two"), ranks=2)
    alone, two = (metrics(tmp_path / name)[-1] for name in ("alone", "two"))
    for one, other in zip(alone["validation_by_position/same"], two["validation_by_position/same"], strict=True):
        assert other == [one[0], one[1], pytest.approx(one[2], rel=1e-5)]
    assert two["validation_loss/again"] == pytest.approx(alone["validation_loss"], rel=1e-5)


def test_names_and_shards_are_looked_at_before_the_run(sharded_text: ShardedText, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"data\.validation names 'a/b', expected letters"):
        parse([*words(Layout(), sharded_text, run), f"--data.validation={{a/b: {sharded_text.prefix}}}"], "")
    with pytest.raises(InputError, match=r"no\.manifest\.json: No such file"):
        train(parse([*words(Layout(), sharded_text, run), "--data.validation={books: /no}"], ""))
