"""The moving average of the weights, and that a resume in any layout goes on with it and with Muon's momentum."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.weights_file import WriteOptions
from ecp_scale.command_line import parse
from ecp_scale.errors import InputError
from ecp_scale.training.loop import train
from ecp_scale.training.step import StepResult, optimizer_step
from tests.corpus import ShardedText
from tests.launching import metrics, run, run_successfully
from tests.parallel.layouts import Layout

DECAY = 0.6


def options(text: ShardedText, folder: Path, layout: Layout, steps: int) -> list[str]:
    """Command line of a run that keeps an average of its weights and a checkpoint of every step."""
    words = layout.options(text, folder)
    kept = ("--checkpoint.every_steps=1", "--checkpoint.keep_last=9", f"--optimizer.average_decay={DECAY}")
    return [*words, *kept, "--resume=auto", "--optimizer.schedule=constant", f"--training.steps={steps}"]


def trained(text: ShardedText, folder: Path, layout: Layout, steps: int) -> None:
    """Train until a step."""
    words = options(text, folder, layout, steps)
    if layout.ranks == 1:
        train(parse(words, ""))
    else:
        run_successfully("launch/pretrain_ecp.py", *words, ranks=layout.ranks)


def weights(run_folder: Path, step: int, model: Path, average: bool) -> dict[str, torch.Tensor]:
    """Those of a step, converted."""
    export(run_folder / "checkpoints" / f"step-{step:08d}", model, WriteOptions(average=average))
    return ExportedModel.open(model).load().state_dict()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    """Tensors by name; padding of the vocabulary aside."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_average_follows_the_weights_and_both_go_on_in_any_layout(
    optimizer: str, sharded_text: ShardedText, tmp_path: Path
) -> None:
    first = Layout(zero=0, optimizer=optimizer)
    trained(sharded_text, tmp_path / "a", first, 4)
    last = [weights(tmp_path / "a", step, tmp_path / f"{step}", average=False) for step in range(1, 5)]
    expected = last[0]
    for step, found in enumerate(last[1:], start=2):
        kept = min(DECAY, (1 + step) / (10 + step))
        expected = {name: kept * value + (1 - kept) * found[name] for name, value in expected.items()}
    averaged = weights(tmp_path / "a", 4, tmp_path / "average", average=True)
    assert_close(averaged, expected, 1e-6)
    assert (averaged["layers.0.attention.query.weight"] - last[-1]["layers.0.attention.query.weight"]).abs().max() > 0

    largest, one = 2 if optimizer == "muon" else 3, Layout(zero=1, optimizer=optimizer)
    chains = [
        (first, first),
        (one, one),
        (Layout(zero=largest, optimizer=optimizer), first),
        (first, Layout(data=2, zero=largest, optimizer=optimizer)),
    ]
    if optimizer == "muon":  # a matrix is cut by ranks of both kinds
        chains.append((replace(one, tensor=2), replace(one, data=2)))
    for number, (before, after) in enumerate(chains):
        folder = tmp_path / f"chain-{number}"
        trained(sharded_text, folder, before, 2)
        trained(sharded_text, folder, after, 4)
        losses, alone = ([record["loss"] for record in metrics(place)] for place in (folder, tmp_path / "a"))
        assert losses == pytest.approx(alone, abs=1e-5)
        assert_close(weights(folder, 4, tmp_path / f"average-{number}", average=True), averaged, 2e-5)


def test_an_average_is_marked_and_missed_where_there_is_none(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = options(sharded_text, tmp_path / "a", Layout(), 2)
    train(parse(words, ""))
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000002"
    convert = ("launch/convert_checkpoint.py", "--checkpoint", checkpoint, "--output", tmp_path / "model")
    assert "averages of tensors of step 2" in run_successfully(*convert, "--average")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["ecp_scale"]["average"] is True
    assert "with no average" in run_successfully("launch/evaluate.py", "--model", tmp_path / "model", "--verify")
    done = run(*convert)
    assert done.returncode == 2
    assert "holds an average of weights (step 2" in done.stderr

    train(parse([*words, "--training.steps=3", "--optimizer.average_decay=null"], ""))
    with pytest.raises(InputError, match=r"step-00000003: holds no average .* optimizer\.average_decay"):
        export(checkpoint.with_name("step-00000003"), tmp_path / "other", WriteOptions(average=True))


def test_layouts_that_cut_matrices_everywhere_are_refused(sharded_text: ShardedText, tmp_path: Path) -> None:
    for layout, message in (
        (Layout(zero=3, optimizer="muon"), r"optimizer\.name muon needs whole matrices, which stage 3 cuts"),
        (Layout(zero=2, offload=True, optimizer="muon"), r"optimizer\.name muon has its states on the ranks' device"),
    ):
        with pytest.raises(InputError, match=message):
            parse(options(sharded_text, tmp_path / "a", layout, 2), "")
    for value in ("1", "-0.1"):
        with pytest.raises(InputError, match=r"optimizer\.average_decay is .*, expected at least 0 and below 1"):
            parse([*options(sharded_text, tmp_path / "a", Layout(), 2), f"--optimizer.average_decay={value}"], "")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_first_update_leaves_the_optimizer_able_to_begin(
    optimizer: str, sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter([True, False, False])

    def skipping(engine: Any, *arguments: Any, **named: Any) -> StepResult:
        if next(results):
            return StepResult(6.0, float("inf"), skipped=True, stop_requested=False, sums=tuple(arguments[-1]))
        return optimizer_step(engine, *arguments, **named)

    monkeypatch.setattr("ecp_scale.training.loop.optimizer_step", skipping)
    train(parse(options(sharded_text, tmp_path / "run", Layout(zero=1, optimizer=optimizer), 3), ""))
    first, last = (weights(tmp_path / "run", step, tmp_path / f"{step}", average=False) for step in (2, 3))
    kept = min(DECAY, 4 / 13)
    expected = {name: kept * value + (1 - kept) * last[name] for name, value in first.items()}
    assert_close(weights(tmp_path / "run", 3, tmp_path / "average", average=True), expected, 1e-6)
