"""The paper's experiment from files to the table, at toy size: docs/reproduce.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import ShardedText
from tests.launching import ROOT, environment
from tests.parallel.layouts import RECIPE, SMALL_MODEL

SMALL = {
    **{key: value for key, value in SMALL_MODEL.items() if key != "model.vocab_size"},
    **RECIPE,
    "training.steps": 3,
    "training.validation_every_steps": 3,
    "optimizer.schedule": "constant",
}


def article(documents: tuple[str, ...], first: int) -> str:
    """Text in the form of WikiText: headings, lines with spaces around them, unknown words."""
    lines = [line for text in documents for line in text.split("\n") if line.strip()][first : first + 400]
    return "".join(f" {line.strip().replace('return', '<unk>')} \n" for line in ["= Title =", "", *lines])


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    """Run launch/reproduce.sh with this interpreter."""
    return subprocess.run(
        [str(ROOT / "launch" / "reproduce.sh"), *map(str, words)],
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not os.access("/bin/bash", os.X_OK), reason="needs bash")
def test_the_chain_runs_from_files_to_the_table_and_goes_on(sharded_text: ShardedText, tmp_path: Path) -> None:
    texts = [article(sharded_text.documents, first) for first in (0, 400, 800)]
    files = []
    for name, text in zip(("train", "valid", "test"), texts, strict=True):
        files.append(tmp_path / f"wiki.{name}.tokens")
        files[-1].write_text(text)
    letters = sorted({character for text in texts for character in text if not character.isspace()})
    pieces = ["[PAD]", "[UNK]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "def", "##elf"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    words = ["wikitext-103-release", f"wordpiece:{tmp_path / 'vocab.txt'}", *files, tmp_path / "paper"]
    small = [f"--{key}={value}" for key, value in {**SMALL, "model.vocab_size": len(pieces)}.items()]
    done = run_script(*words, *small)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for text, name in zip(texts, ("train", "validation", "test"), strict=True):
        counted = len(text.split())
        said = f"{counted:,} words ({counted + text.count(chr(10)):,} with line ends), {len(text.encode()):,} bytes"
        assert f"shards/{name}: 1 shards, 1 documents" in done.stdout
        assert said in done.stdout
    table = (tmp_path / "paper" / "table.md").read_text()
    found = {name: json.loads((tmp_path / "paper" / f"{name}.json").read_text()) for name in ("release", "sliding")}
    for protocol, figures in found.items():
        assert f"| {protocol} | {figures['token_perplexity']:.4f} |" in table
        assert f"{figures['word_and_line_end_perplexity']:.4f} | {figures['bits_per_byte']:.4f}" in table
        assert figures["words"] == len(texts[2].split())
        # One likelihood in three units.
        pieces_per_unit = figures["tokens_per_word"] * figures["words"] / (figures["words"] + figures["line_ends"])
        expected = figures["token_perplexity"] ** pieces_per_unit
        assert figures["word_and_line_end_perplexity"] == pytest.approx(expected, rel=1e-6)
    again = run_script(*words, *small)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "paper" / "table.md").read_text() == table
    assert len((tmp_path / "paper" / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_its_files_the_script_says_what_it_takes() -> None:
    done = run_script("wikitext-103")
    assert done.returncode == 2
    assert done.stderr.startswith("One of the paper's experiments on text")
    assert "launch/reproduce.sh RECIPE TOKENIZER TRAIN VALIDATION TEST OUTPUT" in done.stderr
