"""launch/compare.py: its statistics, its table, and that it does no work twice."""

import json
from pathlib import Path

import pytest

from ecp_scale.evaluation.comparison import Cell, Summary, markdown, plot, summaries
from tests.corpus import ShardedText
from tests.launching import run, run_successfully
from tests.parallel.layouts import RECIPE, SMALL_MODEL

SCRIPT = "launch/compare.py"


def cell(architecture: str, seed: int, bits: float, parameters: int = 1000) -> Cell:
    """A cell whose figures are easy to add up."""
    return Cell(
        architecture=architecture,
        seed=seed,
        protocol="sliding",
        token_perplexity=10 * bits,
        word_perplexity=100 * bits,
        bits_per_byte=bits,
        parameters=parameters,
        flops_per_token=2e6,
        trained_positions=64 if architecture == "ecp" else 32,
        tokens=500,
        tokens_per_second=1000.0,
        peak_memory_bytes=2**20 * seed,
        curve=[[100, 5.0], [500, 4.0 + seed]],
    )


CELLS = [cell("ecp", 1, 2.0), cell("ecp", 2, 2.4), cell("longlora", 1, 2.1, 1010), cell("longlora", 2, 2.5, 1010)]


def test_figures_are_means_and_sample_deviations_and_differences_are_paired() -> None:
    ecp, longlora = summaries(CELLS)
    assert ecp["bits_per_byte"] == Summary(pytest.approx(2.2), pytest.approx(0.2828, abs=1e-4))
    assert longlora["bits_per_byte_difference"] == Summary(pytest.approx(0.1), pytest.approx(0, abs=1e-12))
    assert longlora["parameters_difference"] == pytest.approx(0.01)
    table = markdown([ecp, longlora])
    assert "| ecp | 2.2000 ± 0.2828 | +0.0000 ± 0.0000 | 22.00 ± 2.83 |" in table
    assert "| longlora | 2.3000 ± 0.2828 | +0.1000 ± 0.0000 |" in table
    assert "1,010 (+1.00%) | 2.00 | 1,000 ± 0 | 2 ± 1 |" in table


def test_one_seed_has_no_deviation() -> None:
    assert "| ecp | 2.0000 | +0.0000 |" in markdown(summaries(CELLS[:1]))


def test_the_plot_has_a_line_for_every_architecture(tmp_path: Path) -> None:
    plot(CELLS, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "ecp" in text
    assert "longlora (latents only)" in text


def options(text: ShardedText, output: Path) -> list[str]:
    """A comparison of very small runs."""
    values: dict[str, object] = {
        "model.preset": "scaled-125m",
        **SMALL_MODEL,
        "model.key_value_heads": 2,
        **RECIPE,
        "training.steps": 3,
        "training.validation_every_steps": 3,
        "data.prefix": text.prefix,
        "data.validation_prefix": text.prefix,
    }
    return ["--output", str(output), "--seeds=1", *(f"--{key}={value}" for key, value in values.items())]


def test_finished_cells_are_not_done_again(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = options(sharded_text, tmp_path)
    assert "ecp-seed1: " in run_successfully(SCRIPT, "--architectures=ecp", *words)
    cells = tmp_path / "cells" / "ecp-seed1.json"
    before = cells.read_bytes()
    out = run_successfully(SCRIPT, "--architectures=ecp,perceiver_ar", *words)
    assert "ecp-seed1: done already" in out
    assert cells.read_bytes() == before
    content = json.loads((tmp_path / "comparison.json").read_text())
    ecp, perceiver = content["cells"]
    assert (ecp["tokens"], perceiver["tokens"]) == (768, 768)
    assert (ecp["trained_positions"], perceiver["trained_positions"]) == (64, 32)
    assert ecp["parameters"] == perceiver["parameters"]
    assert ecp["flops_per_token"] > perceiver["flops_per_token"]
    assert ecp["bits_per_byte"] != perceiver["bits_per_byte"]
    table = (tmp_path / "comparison.md").read_text()
    assert f"| ecp | {ecp['bits_per_byte']:.4f} | +0.0000 |" in table
    assert f"| perceiver_ar | {perceiver['bits_per_byte']:.4f} |" in table
    assert (tmp_path / "comparison.svg").stat().st_size > 1000

    refused = run(SCRIPT, "--architectures=ecp", *words, "--optimizer.learning_rate=1")
    assert refused.returncode == 2
    assert "optimizer.learning_rate was 0.002 and is now 1.0" in refused.stderr


def test_a_dry_run_counts(sharded_text: ShardedText, tmp_path: Path) -> None:
    names = "ecp,compressed_double_attention"
    out = run_successfully(SCRIPT, f"--architectures={names}", *options(sharded_text, tmp_path / "x"), "--dry-run")
    assert "+0.00%" in out
    assert "compressed_double_attention" in out
    assert not (tmp_path / "x").exists()


def test_everything_wrong_is_said_before_any_work(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = options(sharded_text, tmp_path / "x")
    message = run(SCRIPT, "--architectures=ecp,mamba,ecp", *words, "--seeds=1,two").stderr
    for part in ("names 'mamba', expected some of ecp", "--seeds is '1,two'", "names something twice: ecp,mamba,ecp"):
        assert part in message, part
    message = run(SCRIPT, "--architectures=ecp,longlora", *words, "--model.key_value_heads=1").stderr
    assert "with model.architecture longlora: longlora shifts half of the key/value heads" in message
    assert not (tmp_path / "x").exists()
