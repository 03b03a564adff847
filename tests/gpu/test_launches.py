"""Programs on a GPU: runs under every ZeRO stage beside the CPU's, resume, conversion, evaluation, generation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ecp_scale.checkpoint.folder import find_checkpoint
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout
from tests.test_classification import image_of, png, write_parquet

SCRIPT = "launch/pretrain_ecp.py"
STEPS = 6


def options(text: ShardedText, output: Path, precision: str, stage: int) -> list[object]:
    """A small run of the scaled settings."""
    layout = Layout(zero=stage, settings="scaled", precision=precision, steps=STEPS)
    sizes = {"width": 128, "heads": 4, "key_value_heads": 2, "feed_forward_width": 256}
    sizes |= {"sequence_length": 512, "segment_length": 128}
    kept_at_half = ["--checkpoint.every_steps=3"]
    return [*layout.options(text, output), *(f"--model.{name}={size}" for name, size in sizes.items()), *kept_at_half]


@pytest.fixture(scope="module")
def on_cpu(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run in fp32 on the CPU."""
    output = tmp_path_factory.mktemp("cpu") / "run"
    run_successfully(SCRIPT, *options(sharded_text, output, "fp32", 0))
    return losses(output)


def losses(output: Path) -> list[float]:
    """Of every step."""
    return [record["loss"] for record in metrics(output)]


@pytest.mark.parametrize(
    ("precision", "stage", "error"),
    [("fp32", 0, 2e-4), ("fp32", 3, 2e-4), ("bf16", 1, 0.01), ("bf16", 2, 0.01), ("bf16", 3, 0.01)],
)
def test_a_run_learns_what_it_learns_on_the_cpu(
    precision: str, stage: int, error: float, on_cpu: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    run_successfully(SCRIPT, *options(sharded_text, tmp_path / "run", precision, stage), gpu=True)
    found = losses(tmp_path / "run")
    assert on_cpu[0] - on_cpu[-1] > 0.1  # it learns
    assert found == pytest.approx(on_cpu, rel=error)


@pytest.mark.parametrize(("precision", "stage", "error"), [("fp32", 0, 2e-4), ("bf16", 1, 0.02), ("bf16", 2, 0.02)])
def test_muon_and_an_average_do_what_they_do_on_the_cpu(
    precision: str, stage: int, error: float, sharded_text: ShardedText, tmp_path: Path
) -> None:
    chosen = ("--optimizer.name=muon", "--optimizer.average_decay=0.9")
    for name, kind, zero in (("cpu", "fp32", 0), ("gpu", precision, stage)):
        words = (*options(sharded_text, tmp_path / name, kind, zero), *chosen)
        run_successfully(SCRIPT, *words, gpu=name == "gpu")
        averaged = ("--checkpoint", tmp_path / name, "--output", tmp_path / f"{name}-model", "--average")
        run_successfully("launch/convert_checkpoint.py", *averaged)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=error)
    found, wanted = (load_file(tmp_path / f"{name}-model" / "model.safetensors") for name in ("gpu", "cpu"))
    errors = {name: ((found[name].float() - x.float()).norm() / x.norm()).item() for name, x in wanted.items()}
    assert max(errors.values()) < 25 * error, errors


def test_a_classifier_trains_and_is_scored(tmp_path: Path) -> None:
    rng, shades = np.random.default_rng(1), [number % 4 for number in range(64)]
    source = write_parquet(tmp_path / "images.parquet", [png(image_of(shade, rng)) for shade in shades], shades)
    made = ("--recipe", "scifar10", "--input", source, "--output-prefix", tmp_path / "images")
    run_successfully("data_tools/preprocess.py", *made)
    data = (f"--data.prefix={tmp_path / 'images'}", f"--data.validation_prefix={tmp_path / 'images'}")
    steps = ("--training.steps=4", "--optimizer.warmup_tokens=1024", "--training.global_batch_size=16")
    for name, gpu in (("cpu", False), ("gpu", True)):
        words = (
            "--config",
            "scifar10",
            *data,
            *steps,
            "--model.dropout=0",
            "--model.layers=3",
            "--model.inputs=values",
        )
        run_successfully(SCRIPT, *words, f"--training.output_dir={tmp_path / name}", gpu=gpu)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=2e-3)
    run_successfully("launch/convert_checkpoint.py", "--checkpoint", tmp_path / "gpu", "--output", tmp_path / "model")
    said = run_successfully(
        "launch/evaluate.py", "--model", tmp_path / "model", "--data", tmp_path / "images", gpu=True
    )
    assert "accuracy" in said


def test_a_resumed_run_goes_on_and_its_checkpoint_is_of_use(sharded_text: ShardedText, tmp_path: Path) -> None:
    whole, resumed, model = (tmp_path / name for name in ("whole", "resumed", "model"))
    run_successfully(SCRIPT, *options(sharded_text, whole, "bf16", 1), "--logging.profile_steps=[2,2]", gpu=True)
    shutil.copytree(whole, resumed)
    shutil.rmtree(find_checkpoint(resumed))
    run_successfully(SCRIPT, *options(sharded_text, resumed, "bf16", 1), "--resume=auto", gpu=True)
    # FlashAttention adds gradients of keys in any order.
    assert losses(resumed)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-3)
    run_successfully("launch/convert_checkpoint.py", "--checkpoint", whole, "--output", model)
    for precision in ("fp32", "bf16"):
        words = ("--model", model, "--data", sharded_text.text, "--precision", precision)
        assert "perplexity" in run_successfully("launch/evaluate.py", *words, gpu=True)
    prompt = ("--model", model, "--prompt", "import os", "--max-new-tokens", 300)
    assert run_successfully("launch/generate.py", *prompt, gpu=True).strip()
