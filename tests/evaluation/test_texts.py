"""Texts are measured piece by piece, as they are as a whole."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ecp_scale.data.tokenizer import load_tokenizer
from ecp_scale.evaluation import texts
from ecp_scale.evaluation.texts import measure_text, read_text
from ecp_scale.preparation import cutting
from tests.corpus import ShardedText
from tests.launching import ROOT, environment

PEAK = """
import resource, sys
from ecp_scale.data.tokenizer import load_tokenizer
from ecp_scale.evaluation.texts import read_text
tokenizer = load_tokenizer("byte")
read_text(sys.argv[1], tokenizer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = read_text(sys.argv[2], tokenizer)
sum(int(text.ids[start : start + 4096].sum()) for start in range(0, len(text.ids), 4096))
print(len(text.ids), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_pieces_have_the_ids_and_the_words_of_the_whole(
    kind: str, sharded_text: ShardedText, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer("byte" if kind == "byte" else f"sentencepiece:{sharded_text.tokenizer}")
    monkeypatch.setattr(cutting, "NEIGHBOURHOOD", 8)
    draw = random.Random(3)
    words = [
        "word",
        "ein",
        "\u8a9e\u3002\u6f22\uff0c\u5b57",
        "\n",
        "\t",
        "  ",
        " ",
        "\u00a0",
        "caf\u00e9",
        "x" * 40,
        "",
    ]
    for _ in range(20):
        document = "".join(draw.choice(words) + draw.choice(["", " ", "\n"]) for _ in range(300))
        borders = sorted(draw.choices(range(len(document)), k=5))
        parts = [document[a:b] for a, b in zip([0, *borders], [*borders, len(document)], strict=True)]
        monkeypatch.setattr(texts, "Cutter", lambda tokenizer: cutting.Cutter(tokenizer, characters=50))
        found = measure_text([parts, [document]], tokenizer)
        ids = [*tokenizer.encode(document), tokenizer.end_of_document]
        assert np.array_equal(found.ids[:], ids * 2)
        assert found.words == 2 * len(document.split())
        assert found.lines == 2 * document.count("\n")
        assert found.bytes == 2 * len(document.encode())
        assert found.ids[3:10].tolist() == ids[3:10]
        assert len(found.ids[7:3]) == len(found.ids[len(found.ids) :]) == 0


def test_a_long_text_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    line = "words of a line that says nothing, and ends here\n"
    short.write_text(line * 40_000)
    long.write_text(line * 1_000_000)
    words = [sys.executable, "-c", PEAK, str(short), str(long)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True, cwd=ROOT)
    count, grown = map(int, done.stdout.split())
    assert count == 1 + long.stat().st_size
    assert grown < 40e6


def test_many_files_are_as_many_documents(tmp_path: Path) -> None:
    for number, text in enumerate(("one two", "three", "four\n")):
        (tmp_path / f"{number}.txt").write_text(text)
    tokenizer = load_tokenizer("byte")
    found = read_text(str(tmp_path), tokenizer)
    assert found.words == 4
    assert int((found.ids[:] == tokenizer.end_of_document).sum()) == 3


def test_a_disk_without_room_for_the_ids_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 1_000_000)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from ecp_scale.data.tokenizer import load_tokenizer; from ecp_scale.evaluation.texts import read_text\n"
        "try:\n    read_text(sys.argv[1], load_tokenizer('byte'))\n"
        "except ValueError as error:\n    print(type(error).__name__, error)"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "text.txt")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("InputError the ids of the text do not fit into "), done.stderr
    assert "name another folder with TMPDIR" in done.stdout
