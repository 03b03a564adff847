"""Ranks that share a model, or a text, say what one process says."""

import json
from pathlib import Path

import pytest

from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.evaluation.generation import Sampling, generate
from ecp_scale.evaluation.perplexity import evaluate
from ecp_scale.evaluation.texts import read_text
from tests.corpus import ShardedText
from tests.evaluation.evaluate_layouts import PROTOCOLS
from tests.launching import run, run_successfully
from tests.parallel.layouts import Layout, trained


@pytest.fixture(scope="module")
def folder(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model."""
    output = tmp_path_factory.mktemp("exported") / "model"
    export(find_checkpoint(trained(Layout(), sharded_text)), output)
    return output


def test_every_layout_gives_the_figures_and_the_text_of_one_process(
    folder: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    output, data = tmp_path / "figures.json", tmp_path / "text.txt"
    data.write_text("\n".join(sharded_text.documents)[:2000])
    run_successfully("tests/evaluation/evaluate_layouts.py", folder, data, output, ranks=4)
    found = json.loads(output.read_text())
    exported = ExportedModel.open(folder)
    model, end = exported.load(device="cpu"), exported.tokenizer.end_of_document
    text = read_text(str(data), exported.tokenizer)
    expected = {protocol: evaluate(model, text, end, protocol) for protocol in PROTOCOLS}
    new = list(generate(model, text.ids[:50].tolist(), 40, Sampling(seed=3)))
    for tensor in ("1", "2", "4"):
        assert found[tensor]["new"] == new
        for protocol, result in expected.items():
            nll, *rest = found[tensor]["figures"][protocol]
            assert nll == pytest.approx(result.nll, rel=1e-6)
            assert rest == [result.tokens_scored, result.words, result.bytes]
    assert found["4"]["bytes"] < 0.5 * found["2"]["bytes"] + 20_000 < 0.3 * found["1"]["bytes"] + 40_000


def test_the_programs_share_a_model_and_have_one_output(
    folder: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = ("--model", folder, "--data", sharded_text.text)
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    run_successfully("launch/evaluate.py", *words, "--json", alone)
    out = run_successfully("launch/evaluate.py", *words, "--json", shared, "--parallel.tensor", 2, ranks=2)
    assert out.count("bits_per_byte   ") == 1
    expected, found = (json.loads(path.read_text()) for path in (alone, shared))
    assert found.pop("bits_per_byte") == pytest.approx(expected.pop("bits_per_byte"), rel=1e-6)
    assert found["tokens_scored"] == expected["tokens_scored"]
    prompt = ("--model", folder, "--prompt", "def ", "--max-new-tokens", 20)
    assert run_successfully("launch/generate.py", *prompt, ranks=2) == run_successfully("launch/generate.py", *prompt)


def test_a_launch_that_cannot_share_the_model_is_refused(folder: Path, sharded_text: ShardedText) -> None:
    words = ("--model", folder, "--data", sharded_text.text)
    done = run("launch/evaluate.py", *words, "--parallel.tensor", 3)
    assert done.returncode == 2
    assert "error: --parallel.tensor 3: the launch has 1 ranks, expected a multiple of it" in done.stderr
    done = run("launch/evaluate.py", "--model", folder, "--data", "nowhere", ranks=2, launcher="torchrun")
    assert done.stderr.count("error: rank 0: input nowhere: no such file") == 1
    assert "Traceback" not in done.stderr.split("error: ")[0]
