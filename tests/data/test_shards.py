"""Shards: Megatron reads them, ours reads Megatron's, and damage is named."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import Manifest
from ecp_scale.data.shards import TokenShard
from ecp_scale.data.tokenizer import SentencePieceTokenizer
from ecp_scale.errors import InputError
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.preparation.verification import verify
from tests.corpus import ShardedText, write_sharded_text


def test_megatron_opens_our_shards_with_equal_documents(sharded_text: ShardedText) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = SentencePieceTokenizer(sharded_text.tokenizer)
    manifest = Manifest.read(Path(sharded_text.prefix))
    assert len(manifest.shards) > 1
    documents = []
    for record in manifest.shards:
        dataset = IndexedDataset(str(Path(sharded_text.prefix).parent / record.name))
        assert len(dataset) == record.counts.documents == len(dataset.document_indices) - 1
        documents += [dataset[number].tolist() for number in range(len(dataset))]
    expected = [[*tokenizer.encode(text), tokenizer.end_of_document] for text in sharded_text.documents]
    assert documents == expected


def test_shards_of_megatrons_builder_open_in_ours(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[1, 2, 3], [4], [70_000, 6]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    shard = TokenShard(tmp_path / "theirs")
    assert [shard.document(number).tolist() for number in range(3)] == documents


def test_the_result_does_not_depend_on_the_number_of_workers(sharded_text: ShardedText, tmp_path: Path) -> None:
    many = tmp_path / "documents.jsonl"
    lines = [line for text in sharded_text.documents for line in text.splitlines() if line.strip()]
    many.write_text(
        "".join(json.dumps({"body": "\n".join(lines[i : i + 5])}) + "\n" for i in range(0, len(lines), 5)) * 20
    )
    spec = f"sentencepiece:{sharded_text.tokenizer}"
    for workers in (1, 2):
        output = tmp_path / str(workers) / "out"
        preprocess([str(many)], spec, str(output), parsing=Parsing("body"), workers=workers, shard_tokens=300_000)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("out*")} for name in ("1", "2"))
    assert len(first) > 4
    assert first == second


def test_the_manifest_counts_what_is_there(sharded_text: ShardedText) -> None:
    totals = Manifest.read(Path(sharded_text.prefix)).totals
    assert totals.documents == len(sharded_text.documents)
    assert totals.bytes == sum(len(text.encode()) for text in sharded_text.documents)
    assert totals.words == sum(len(text.split()) for text in sharded_text.documents)
    assert totals.tokens == Corpus(sharded_text.prefix, 64).tokens


def test_the_tokenizer_gives_every_text_back(sharded_text: ShardedText) -> None:
    tokenizer = SentencePieceTokenizer(sharded_text.tokenizer)
    for text in [*sharded_text.documents, "  two  spaces\n\n\ttab\r\nÄ 漢字 🙂 \x00 end  ", "\n", " "]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture
def copy(tmp_path: Path) -> ShardedText:
    """Shards that a test may damage."""
    return write_sharded_text(tmp_path)


def refused(prefix: str) -> str:
    """The message of a corpus that must be refused."""
    with pytest.raises(InputError) as error:
        Corpus(prefix, 64)
    return str(error.value)


def test_truncated_data_is_named_with_sizes(copy: ShardedText) -> None:
    data = next(Path(copy.prefix).parent.glob("*00000-of-*.bin"))
    data.write_bytes(data.read_bytes()[:-10])
    message = refused(copy.prefix)
    assert data.name in message
    assert f"{data.stat().st_size} bytes, expected {data.stat().st_size + 10}" in message


@pytest.mark.parametrize("cut", [0, 10, 40])
def test_a_damaged_index_is_named(cut: int, copy: ShardedText) -> None:
    index = next(Path(copy.prefix).parent.glob("*00000-of-*.idx"))
    index.write_bytes(index.read_bytes()[:cut])
    assert index.name in refused(copy.prefix)


def test_an_index_of_another_kind_is_named_when_it_is_read(copy: ShardedText) -> None:
    index = next(Path(copy.prefix).parent.glob("*00000-of-*.idx"))
    index.write_bytes(b"something else altogether"[: index.stat().st_size].ljust(index.stat().st_size, b"."))
    with pytest.raises(InputError, match=r"00000-of-.*\.idx: not a Megatron index"):
        Corpus(copy.prefix, 64).window(0)


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".manifest.json"])
def test_random_damage_is_harmless_or_refused_by_name(suffix: str, copy: ShardedText) -> None:
    """A thousand mutations in all: bytes changed, cut off, added or doubled."""
    folder = Path(copy.prefix).parent
    path = sorted(folder.glob(f"*{suffix}"))[0]
    whole = path.read_bytes()
    rng = random.Random(suffix)
    refusals: list[str] = []
    for _ in range(334):
        content = bytearray(whole)
        kind = rng.choice(["change", "change", "change", "cut", "add", "double"])
        if kind == "change":
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        elif kind == "cut":
            del content[rng.randrange(len(content)) :]
        elif kind == "add":
            content += bytes(rng.randrange(256) for _ in range(rng.randint(1, 50)))
        else:
            place = rng.randrange(len(content))
            content[place:place] = content[place : place + rng.randint(1, 20)]
        path.write_bytes(content)
        try:
            corpus = Corpus(copy.prefix, 64)
            for window in (0, corpus.windows // 2, corpus.windows - 1):
                assert corpus.window(window).shape == (65,)
            shard = corpus.shard(0)
            for number in (0, len(shard.lengths) - 1):
                shard.document(number)
            problems = list(verify(Path(copy.prefix)))
            assert problems or bytes(content) == whole or suffix == ".manifest.json"
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(str(folder) in message for message in refusals)


def test_another_tokenizer_beside_the_shards_is_named(copy: ShardedText) -> None:
    beside = Path(copy.prefix).parent / "train.tokenizer.model"
    beside.write_bytes(beside.read_bytes() + b"x")
    message = refused(copy.prefix)
    assert "train.tokenizer.model" in message
    assert "train.manifest.json" in message
    assert "were made with" in message


def test_missing_parts_are_named(copy: ShardedText, tmp_path: Path) -> None:
    assert "nothing.manifest.json: No such file" in refused(str(tmp_path / "nothing"))
    next(Path(copy.prefix).parent.glob("*00001-of-*.bin")).unlink()
    assert ".bin: No such file" in refused(copy.prefix)


def test_a_manifest_of_another_format_is_named(copy: ShardedText) -> None:
    path = Path(copy.prefix).parent / "train.manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": 99}))
    assert "format version 99, expected one of (2, 3, 4)" in refused(copy.prefix)
    path.write_text("{}")
    assert "not a manifest" in refused(copy.prefix)


def test_a_corpus_shorter_than_a_window_is_refused(sharded_text: ShardedText) -> None:
    with pytest.raises(InputError, match="expected at least one window"):
        Corpus(sharded_text.prefix, 10**9)
