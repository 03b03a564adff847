"""A batch that grows in mid-run: the same numbers however it is cut, in one life or two, and the audit agrees."""

from pathlib import Path

import pytest

from ecp_scale.command_line import parse
from ecp_scale.errors import InputError
from ecp_scale.training.loop import train
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout

SCHEDULE = "--training.batch_schedule={512: 6, 1280: 8}"
TOKENS = [256, 512, 896, 1280, 1792, 2304]
"""After steps of 4, 4, 6, 6, 8 and 8 sequences of 64 tokens."""


def numbers(text: ShardedText, run: Path, layout: Layout, *more: str) -> list[float]:
    """Losses and norms of a run of six steps."""
    words = [*map(str, layout.options(text, run)), SCHEDULE, "--training.steps=6", "--resume=auto", *more]
    train(parse(words, ""))
    records = metrics(run)
    assert [record["tokens"] for record in records] == TOKENS[: len(records)]
    return [record[key] for record in records for key in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def expected(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of whole micro-batches of two, under ZeRO-0."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return numbers(sharded_text, run, Layout(), "--training.micro_batch_size=2")


@pytest.mark.parametrize(
    "layout", [Layout(zero=0), Layout(zero=1), Layout(zero=2), Layout(zero=3), Layout(zero=2, offload=True)], ids=str
)
def test_a_growing_batch_is_the_same_however_it_is_cut(
    layout: Layout, expected: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    assert numbers(sharded_text, tmp_path / "run", layout) == pytest.approx(expected, abs=1e-5)


def test_a_growing_batch_goes_on_after_a_resume_and_the_audit_agrees(
    expected: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fixed = "--optimizer.decay_tokens=2304"
    numbers(sharded_text, run, Layout(zero=1), "--training.steps=3", fixed)
    assert numbers(sharded_text, run, Layout(zero=1), fixed) == pytest.approx(expected, abs=1e-5)
    assert "agrees up to step 6 (2,304 tokens" in run_successfully("launch/audit_data.py", run)


def test_the_length_of_a_run_counts_its_schedule() -> None:
    config = parse(
        [
            "--config",
            "demo",
            SCHEDULE.replace("6", "8"),
            "--model.sequence_length=64",
            "--model.segment_length=16",
            "--model.allow_short_receptive_field=true",
            "--model.segment_length=16",
            "--dry-run",
        ],
        "",
    ).config
    assert config.tokens_after(0) == 0
    steps = 0
    tokens = 0
    while steps < 40:
        tokens += config.sequences_after(tokens) * 64
        steps += 1
        assert config.tokens_after(steps) == tokens
        assert config.tokens_after(40, steps, tokens) == config.tokens_after(40)


SMALL = [
    *("--config", "demo", "--model.sequence_length=64", "--model.segment_length=16", "--dry-run"),
    "--model.allow_short_receptive_field=true",
]


@pytest.mark.parametrize("tokens", [1, 256, 511, 512, 513, 1279, 1280, 1281, 5000])
def test_a_length_in_tokens_ends_with_the_step_that_reaches_it(tokens: int) -> None:
    schedule = SCHEDULE.replace("6", "8")
    config = parse([*SMALL, schedule, "--training.global_batch_size=4", f"--training.tokens={tokens}"], "").config
    steps = config.training.steps
    assert config.tokens_after(steps - 1) < tokens <= config.tokens_after(steps)
    # However far the run is: what is left is counted from there.
    for done in range(steps):
        assert config.steps_to(tokens, done, config.tokens_after(done)) == steps
        assert config.run_tokens(done, config.tokens_after(done)) == config.tokens_after(steps)
    # A run that began with smaller batches takes more steps.
    assert config.with_length(3, 300).training.steps > steps or tokens <= 1280


def test_a_length_in_tokens_and_one_in_steps_contradict_each_other() -> None:
    with pytest.raises(InputError, match=r"training\.steps is 7, but training\.tokens 512 decides the length"):
        parse([*SMALL, "--training.steps=7", "--training.tokens=512"], "")


def test_a_run_of_so_many_tokens_is_one_of_its_steps(
    expected: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = [word for word in map(str, Layout().options(sharded_text, tmp_path)) if "training.steps" not in word]
    train(parse([*words, SCHEDULE, "--training.tokens=2200"], ""))
    records = metrics(tmp_path)
    assert [record["tokens"] for record in records] == TOKENS
    assert [record[key] for record in records for key in ("loss", "grad_norm")] == pytest.approx(expected, abs=1e-5)
