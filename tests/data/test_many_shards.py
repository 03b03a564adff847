"""Corpora of more shards than a process may open, and shards that hold what no tokenizer has."""

import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ecp_scale.data import shards
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import Manifest
from ecp_scale.data.shards import OpenShards
from ecp_scale.errors import DamagedDataError, InputError
from ecp_scale.preparation.preprocessing import preprocess
from tests.corpus import ShardedText
from tests.launching import environment
from tests.preparation.writing import byte_level

READ_ALL = """
import resource, sys
from ecp_scale.data.corpus import Corpus
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
corpus = Corpus(sys.argv[1], 16)
print(sum(int(corpus.window(n).sum()) for _ in range(2) for n in range(corpus.windows)))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prefix of 700 shards."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "a.txt").write_text("".join(f"line {number:06d} of the text\n" for number in range(700)))
    lines = shards_of_lines(folder)
    assert len(Manifest.read(Path(lines)).shards) == 700
    return lines


def shards_of_lines(folder: Path) -> str:
    """A shard per line."""
    from ecp_scale.preparation.parsing import Parsing

    preprocess([str(folder / "a.txt")], "byte", str(folder / "x"), parsing=Parsing(text_unit="line"), shard_tokens=30)
    return str(folder / "x")


@pytest.mark.parametrize("limits", [(1024, 1024), (64, 64), (64, 4096)])
def test_more_shards_than_descriptors_are_read(many: str, limits: tuple[int, int]) -> None:
    words = [sys.executable, "-c", READ_ALL, many, *map(str, limits)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    corpus = Corpus(many, 16)
    assert int(done.stdout) == 2 * sum(int(corpus.window(number).sum()) for number in range(corpus.windows))


def test_the_list_of_sources_stays_with_the_rank_that_opened_the_corpus(many: str) -> None:
    corpus = Corpus(many, 16)
    sent = pickle.loads(pickle.dumps(corpus))
    assert len(corpus.manifest.sources) == 1
    assert sent.manifest.sources == ()
    assert sent.digest == corpus.digest
    assert np.array_equal(sent.window(300), corpus.window(300))


def test_the_least_recently_read_shard_is_closed(many: str) -> None:
    names = [Path(many).parent / record.name for record in Manifest.read(Path(many)).shards[:3]]
    opened = OpenShards(2)
    first = opened.shard(names[0])
    assert opened.shard(names[0]) is first
    opened.shard(names[1])
    assert opened.shard(names[0]) is first
    opened.shard(names[2])
    assert opened.shard(names[0]) is first, "it was read after the other"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2 * shards.DESCRIPTORS_OF_OTHERS


@pytest.mark.parametrize("token", [257, 65_535])
def test_an_id_that_no_tokenizer_has_is_refused_where_it_is_read(token: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / "x"))
    path = tmp_path / "x-00000-of-00001.bin"
    ids = np.fromfile(path, dtype=np.uint16)
    ids[700] = token
    ids.tofile(path)
    corpus = Corpus(str(tmp_path / "x"), 100)
    assert len(corpus.window(0)) == 101
    message = rf"x-00000-of-00001\.bin: id {token} at place 700, but the tokenizer has 257 entries"
    for window in (6, 7):  # the last token of one, the first of the other
        with pytest.raises(DamagedDataError, match=message):
            corpus.window(window)


def test_another_text_of_equal_size_is_another_corpus(tmp_path: Path) -> None:
    blends = []
    for name, text in (("a", "one text " * 50), ("b", "two text " * 50), ("c", "one text " * 50)):
        (tmp_path / f"{name}.txt").write_text(text)
        preprocess([str(tmp_path / f"{name}.txt")], "byte", str(tmp_path / name))
        blends.append(Blend([(0, {str(tmp_path / name): 1.0})], 32, seed=1))
    histories = [blend.history(32) for blend in blends]
    assert histories[0]["corpora_tokens"] == histories[1]["corpora_tokens"]
    assert histories[0] != histories[1]
    assert histories[0] == histories[2], "where the corpus lies says nothing"
    assert blends[0].digest(0, 0, 5) == blends[2].digest(0, 0, 5) != blends[1].digest(0, 0, 5)


def test_corpora_that_end_documents_otherwise_do_not_blend(tmp_path: Path) -> None:
    spec = f"hf:{byte_level(tmp_path / 'tokenizer.json', ['<a>', '<b>'])}"
    (tmp_path / "a.txt").write_text("some text " * 50)
    for end in ("<a>", "<b>"):
        preprocess([str(tmp_path / "a.txt")], spec, str(tmp_path / end[1]), end_token=end)
    with pytest.raises(InputError, match=r"corpus .*b ends documents with id 1, .*a with 0"):
        Blend([(0, {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0})], 32, seed=1)


def test_epochs_of_each_corpus_are_counted(sharded_text: ShardedText, tmp_path: Path) -> None:
    spec = f"sentencepiece:{sharded_text.tokenizer}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": sharded_text.documents[0][:4000]}) + "\n")
    preprocess([str(tmp_path / "a.jsonl")], spec, str(tmp_path / "small"))
    blend = Blend([(0, {sharded_text.prefix: 3.0, str(tmp_path / "small"): 1.0})], 64, seed=1)
    samples = 8 * blend.corpora[1].windows
    epochs = [times for _, times in blend.epochs(samples * 64)]
    assert epochs[1] == pytest.approx(2, abs=0.1)
    assert epochs[0] == pytest.approx(6 * blend.corpora[1].windows / blend.corpora[0].windows, abs=0.01)
