"""What the benchmarks compare with computes what this package computes."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import control_plane, size
from benchmarks.peers import MaterialisedLanguageModel
from benchmarks.timing import alternate, peak_bytes, ratio, workers
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups
from tests.launching import ROOT, environment, play
from tests.models.settings import PAPER

NAMES = {
    "layers": "blocks",
    "attention.query": "query",
    "attention.key": "key_value",
    "attention.output": "output",
    "attention.first_output": "first_output",
    "feed_forward.up": "up",
    "feed_forward.down": "down",
}


@pytest.mark.parametrize("by_segment", [True, False])
def test_the_materialised_implementation_is_the_same_model(by_segment: bool, groups: Groups) -> None:
    config = dataclasses.replace(PAPER, dropout=0.0, vocab_multiple=1)
    parallel = ParallelContext(groups.tensor)
    ours = LanguageModel(config, parallel)
    initialize(ours, config, parallel, seed=1)
    theirs = MaterialisedLanguageModel(config, by_segment)
    weights = {}
    for name, weight in ours.state_dict().items():
        for our_part, their_part in NAMES.items():
            name = name.replace(our_part, their_part)
        weights[name] = weight
    theirs.load_state_dict(weights)
    tokens = torch.randint(config.vocab_size, (2, config.sequence_length + 1))
    total, losses = ours(tokens[:, :-1], tokens[:, 1:])
    loss = theirs(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(total.item() / losses.numel(), rel=1e-5)
    (total / losses.numel()).backward()
    loss.backward()
    for name, parameter in theirs.named_parameters():
        if name == "blocks.0.query.weight":
            torch.testing.assert_close(parameter.grad, ours.layers[0].attention.query.weight.grad, rtol=1e-4, atol=1e-7)


@contextmanager
def _counter() -> Iterator[Callable[[], object]]:
    calls = [torch.ones(1)]
    yield lambda: calls.append(torch.ones(len(calls) * 1000))


def test_a_worker_runs_its_contender_in_another_process() -> None:
    with workers({"counter": _counter}) as started:
        (worker,) = started.values()
        assert worker.run() is None
        assert worker.peak_bytes() == 2000 * 4


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    seconds = alternate({name: partial(calls.append, name) for name in "ab"}, rounds=3)
    assert calls == list("abababab")
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3}
    assert ratio({"peer": [2.0, 9.0, 3.0], "ours": [1.0, 1.0, 1.0]}, "peer", "ours") == 3.0


def test_peak_memory_is_what_is_alive_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.ones(1000) + torch.ones(1000)

    assert peak_bytes(run) == 3 * 4000


@pytest.mark.parametrize(
    ("suite", "texts", "library"),
    [
        ("gpu", ("utilisation", "cost per token"), "torch"),
        ("cpu", ("checkpoints",), "torch"),
        ("gpu", ("attention",), "local_attention"),
        ("gpu", ("generation",), "transformers"),
    ],
)
def test_a_suite_runs_at_toy_size_and_is_written(
    suite: str, texts: tuple[str, ...], library: str, tmp_path: Path
) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed; it comes with the extra benchmarks")
    # As a program, since the groups of these tests would be in its way.
    words = [sys.executable, "-m", "benchmarks.run", "--suite", suite, "--toy", "--rounds", "1"]
    subprocess.run([*words, "--output", str(tmp_path), "--only", *texts], check=True, cwd=ROOT)
    names = list(json.loads((tmp_path / f"{suite}.json").read_text())["measurements"])
    assert all(any(text in name for name in names) for text in texts)
    assert all(any(text in name for text in texts) for name in names)
    assert all(name in (tmp_path / f"{suite}.md").read_text() for name in names)


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("estimate", ("--presets", "nope"), "model.preset is 'nope', expected one of demo"),
        ("estimate", ("--presets", "scaled-70b", "--gpus", "100"), "the launch has 100 ranks, not a multiple of"),
        ("run", ("--toy", "--only", "shards", "--output", __file__), "is a file, expected a folder"),
        ("estimate", ("--gpus", "0"), "argument --gpus: '0', expected a whole number from 1"),
        ("estimate", ("--bandwidth", "nan"), "argument --bandwidth: 'nan', expected a number above 0"),
        ("loader", ("--prefix", "nope"), "nope.manifest.json: No such file or directory"),
        ("control_plane", ("--ranks", "-4"), "argument --ranks: '-4', expected a whole number from 1"),
        ("depth", ("--depths", "6,x", "--prefix=p", "--validation-prefix=p", "--output=o"), "'x', expected a whole"),
        ("preprocessing", ("--input", "nope", "--tokenizer", "bytes"), "input nope: no such file or folder"),
        ("size", ("--checkpoint", "nope"), "nope: no such folder"),
        ("command", ("--layers", "0"), "argument --layers: '0', expected a whole number from 1"),
        ("run", ("--rounds", "0"), "argument --rounds: '0', expected a whole number from 1"),
    ],
)
def test_bad_input_is_one_line(module: str, words: tuple[str, ...], said: str) -> None:
    done = play(f"benchmarks/{module}.py", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("others", "transformers, a peer of 'step fp32, others', is not installed; it comes with the extra benchmarks"),
        ("no such measurement", "--only no such measurement: expected texts of step"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    only: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = play("benchmarks/run.py", "--toy", "--output", tmp_path / "results", "--only", only)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "results").exists()


def test_what_the_table_of_sizes_computes_is_what_a_rank_saves() -> None:
    layout = size.Layout("scaled-125m", 8, 1)
    words = ["--one-rank", f"--preset={layout.preset}", f"--ranks={layout.ranks}", f"--stage={layout.stage}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.size", *words], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["saved_bytes"] == pytest.approx(size.saved_bytes(layout), rel=0.02)
    rates = size.rates_of(measured, {"seconds": 2.0, "bytes": 1e9})
    found = size.row(layout, rates)
    assert found["save, s"] == pytest.approx(measured["save_seconds"], rel=0.02)
    assert found["start, s"] == pytest.approx(measured["start_seconds"], rel=0.02)
    assert size.as_table([found]).count("\n") == 3


def test_a_rank_sends_as_many_messages_however_many_ranks_there_are() -> None:
    few, many = (control_plane.simulate(size) for size in (8, 64))
    for stage in ("meet", "agree on GPUs", "heartbeat"):
        # The first one sends a few more, or fewer.
        assert abs(few[stage]["messages_per_rank"] - many[stage]["messages_per_rank"]) < 1
