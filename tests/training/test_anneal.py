"""The recipes of docs/training.md that end a stable run: from a checkpoint in another folder, or from weights."""

import shutil
from pathlib import Path

import pytest

from ecp_scale.command_line import parse
from ecp_scale.errors import InputError
from ecp_scale.training.loop import train
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout

STEP = 4 * 64
"""Tokens of a step."""
PEAK = 2e-3


def words(text: ShardedText, run: Path, *more: str) -> list[str]:
    """A run under wsd that saves every second step."""
    layout = [word for word in map(str, Layout(zero=1).options(text, run)) if not word.startswith("--training.steps")]
    wsd = ("--optimizer.schedule=wsd", "--optimizer.min_lr_ratio=0", "--optimizer.warmup_tokens=0")
    return [*layout, *wsd, "--checkpoint.every_steps=2", "--training.validation_every_steps=100", *more]


@pytest.fixture(scope="module")
def stable(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, whose rate has not begun to fall but at the last."""
    run = tmp_path_factory.mktemp("stable") / "run"
    train(parse(words(sharded_text, run, f"--training.tokens={6 * STEP}", f"--optimizer.cooldown_tokens={STEP}"), ""))
    assert [record["lr"] for record in metrics(run)] == pytest.approx([PEAK] * 5 + [0])
    return run


def test_an_anneal_goes_on_from_the_stable_part_in_another_folder(
    stable: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    anneal = tmp_path / "anneal"
    (anneal / "checkpoints").mkdir(parents=True)
    shutil.copytree(stable / "checkpoints" / "step-00000004", anneal / "checkpoints" / "step-00000004")
    shorter = (f"--training.tokens={8 * STEP}", f"--optimizer.cooldown_tokens={4 * STEP}", "--resume=auto")
    train(parse(words(sharded_text, anneal, *shorter), ""))
    records = metrics(anneal)
    assert [record["step"] for record in records] == [5, 6, 7, 8]
    assert [record["lr"] for record in records] == pytest.approx([PEAK * share for share in (0.75, 0.5, 0.25, 0)])
    # The fifth step has the samples, weights and moments of the stable run: only its update is smaller.
    assert records[0]["loss"] == metrics(stable)[4]["loss"]
    assert [record["step"] for record in metrics(stable)] == [1, 2, 3, 4, 5, 6]
    assert "agrees up to step 8" in run_successfully("launch/audit_data.py", anneal)


def test_an_anneal_that_should_have_ended_before_is_named(
    stable: Path, sharded_text: ShardedText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anneal = tmp_path / "anneal"
    (anneal / "checkpoints").mkdir(parents=True)
    shutil.copytree(stable / "checkpoints" / "step-00000004", anneal / "checkpoints" / "step-00000004")
    for tokens, is_passed in ((3 * STEP, True), (3 * STEP + 1, False)):
        length = (f"--training.tokens={tokens}", f"--optimizer.cooldown_tokens={STEP}", "--resume=auto")
        train(parse(words(sharded_text, anneal, *length), ""))
        said = capsys.readouterr().err
        assert (
            f"nothing to do: step 4 is done, {4 * STEP:,} tokens, and training.tokens is {tokens}" in said
        ) == is_passed
        assert ("finished" in said) != is_passed
    early = (f"--training.tokens={8 * STEP}", f"--optimizer.cooldown_tokens={8 * STEP}", "--resume=auto")
    with pytest.raises(
        InputError, match=r"set optimizer\.learning_rate, optimizer\.cooldown_tokens or training\.tokens"
    ):
        train(parse(words(sharded_text, anneal, *early), ""))


def test_an_anneal_on_other_data_begins_with_the_weights(
    stable: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    model, anneal = tmp_path / "model", tmp_path / "anneal"
    run_successfully("launch/convert_checkpoint.py", "--checkpoint", stable, "--output", model)
    length = (f"--training.tokens={4 * STEP}", f"--optimizer.cooldown_tokens={4 * STEP}", "--training.seed=5")
    train(parse(words(sharded_text, anneal, *length, f"--init-from={model}"), ""))
    records = metrics(anneal)
    assert [record["lr"] for record in records] == pytest.approx([PEAK * share for share in (0.75, 0.5, 0.25, 0)])
    assert records[0]["loss"] < metrics(stable)[0]["loss"] - 0.05
