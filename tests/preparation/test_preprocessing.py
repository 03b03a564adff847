"""One result for every format, number of workers and crash; bad input is named, and can be skipped and counted."""

import errno
import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import Manifest, manifest_path
from ecp_scale.data.shards import TokenShard
from ecp_scale.data.tokenizer import ByteTokenizer, load_tokenizer
from ecp_scale.errors import InputError
from ecp_scale.preparation import outputs
from ecp_scale.preparation.finding import find_sources
from ecp_scale.preparation.journal import journal_path
from ecp_scale.preparation.measuring import measure
from ecp_scale.preparation.merging import merge
from ecp_scale.preparation.parsing import Parsing, hash_fraction
from ecp_scale.preparation.preprocessing import preprocess, share_of
from ecp_scale.preparation.sources import ChangedSourceError, Place, Reading, Source
from ecp_scale.preparation.tokenizer_training import train_tokenizer
from ecp_scale.preparation.verification import verify
from ecp_scale.preparation.writing import ShardWriter
from tests.corpus import ShardedText
from tests.launching import ROOT, environment, run, run_successfully
from tests.preparation.writing import contents, expected, stored, write_jsonl


@pytest.fixture(scope="module")
def documents(sharded_text: ShardedText) -> list[str]:
    """Some hundred documents of different lengths."""
    lines = [line for text in sharded_text.documents for line in text.splitlines() if line.strip()]
    rng = random.Random(1)
    found = []
    while lines:
        count = rng.randint(1, 40)
        found.append("\n".join(lines[:count]))
        lines = lines[count:]
    return found


def test_every_format_gives_the_same_shards(documents: list[str], tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = {"text": documents, "length": [len(text) for text in documents]}
    plain = write_jsonl(tmp_path / "plain.jsonl", documents)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(plain.read_bytes())
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "c.parquet", row_group_size=50)
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    names = ("plain.jsonl", "a.jsonl.gz", "b.jsonl.zst", "c.parquet", "saved")
    for name in names:
        prefix = tmp_path / f"out-{name}" / "x"
        preprocess([str(tmp_path / name)], "byte", str(prefix), shard_tokens=30_000)
        assert stored(prefix) == expected(documents), name
        assert len(Manifest.read(prefix).shards) > 3
        assert list(verify(prefix, deep=True)) == []
    firsts = [next((tmp_path / f"out-{name}").glob("x-00001-of-*.bin")).read_bytes() for name in names]
    assert len(set(firsts)) == 1


def test_plain_text_is_cut_into_the_documents_that_were_asked_for(tmp_path: Path) -> None:
    text = "\n = First = \n\none\n\n = = Part = = \n\ntwo\n\n\n = Second = \n three\n"
    (tmp_path / "wiki.tokens").write_text(text)
    cut = {
        "file": [text],
        "line": [line for line in text.splitlines(True) if line.strip()],
        "block": ["\n = First = \n\n", "one\n\n", " = = Part = = \n\n", "two\n\n\n", " = Second = \n three\n"],
        "article": ["\n = First = \n\none\n\n = = Part = = \n\ntwo\n\n\n", " = Second = \n three\n"],
    }
    for unit, documents in cut.items():
        preprocess([str(tmp_path)], "byte", str(tmp_path / unit), parsing=Parsing(text_unit=unit))
        assert stored(tmp_path / unit) == expected(documents), unit


def test_the_release_joins_stripped_lines_with_separators(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" = A = \n\n the <unk> cat \n")
    preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / "x"), parsing=Parsing(preparation="wikitext-release"))
    assert stored(tmp_path / "x") == expected(["= A =[SEP][SEP]the [UNK] cat"])


def test_filters_drop_and_count(documents: list[str], tmp_path: Path) -> None:
    rows = [{"text": text, "lang": "de" if i % 3 else "en", "n": i} for i, text in enumerate(documents)]
    path = tmp_path / "a.jsonl"
    without_text = [{"text": "", "lang": "de"}, {"text": None, "lang": "de"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *without_text]))
    parsing = Parsing(where=(("lang", "de"),), min_characters=100, max_characters=1000)
    manifest = preprocess([str(path)], "byte", str(tmp_path / "x"), parsing=parsing)
    kept = [text for i, text in enumerate(documents) if i % 3 and 100 <= len(text) <= 1000]
    assert stored(tmp_path / "x") == expected(kept)
    assert manifest.skipped.dropped == len(rows) + 2 - len(kept)


def test_shares_by_hash_hold_every_document_once(documents: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    parts = []
    for share in ((0.0, 0.1), (0.1, 0.5), (0.5, 1.0)):
        prefix = tmp_path / f"{share[0]}"
        preprocess([str(source)], "byte", str(prefix), parsing=Parsing(share=share))
        parts.append(stored(prefix))
    assert sorted(ids for part in parts for ids in part) == sorted(expected(documents))
    assert len(parts[0]) < len(parts[1]) < len(documents)


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\x0b\x1c\x85\xa0\u2003\u3000ab”")))
def test_bytes_and_words_are_those_of_python(text: str) -> None:
    assert measure(text) == (len(text.encode()), len(text.split()), text.count("\n"))


def command(source: Path, prefix: Path, workers: int) -> list[str]:
    """A run of the program."""
    script = str(ROOT / "data_tools" / "preprocess.py")
    options = ("--input", source, "--tokenizer", "byte", "--output-prefix", prefix, "--shard-tokens", 20_000)
    return [sys.executable, script, *map(str, options), "--workers", str(workers)]


def test_killed_at_twenty_moments_the_shards_are_those_of_an_uninterrupted_run(
    documents: list[str], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents * 20)
    subprocess.run(command(source, tmp_path / "whole" / "x", 1), check=True, capture_output=True, env=environment())
    assert len(list((tmp_path / "whole").glob("*.bin"))) > 60, "too few shards to be killed among"
    rng = random.Random(7)
    prefix = tmp_path / "killed" / "x"
    for attempt in range(20):
        words = command(source, prefix, workers=1 + attempt % 2)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        # At most three shards further, so that all twenty find the run unfinished; then at any moment.
        wanted = len(list(prefix.parent.glob("*.bin"))) + rng.randint(0, 2)
        while process.poll() is None and len(list(prefix.parent.glob("*.bin"))) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        assert process.wait() == -signal.SIGKILL
    assert 0 < len(list(prefix.parent.glob("*.bin"))) < len(list((tmp_path / "whole").glob("*.bin")))
    subprocess.run(command(source, prefix, 2), check=True, capture_output=True, env=environment())
    assert contents(prefix.parent) == contents(tmp_path / "whole")


def test_a_finished_run_is_not_done_again_and_another_is_refused(documents: list[str], tmp_path: Path) -> None:
    source, prefix = write_jsonl(tmp_path / "a.jsonl", documents), tmp_path / "x"
    first = preprocess([str(source)], "byte", str(prefix))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("x*")}
    assert preprocess([str(source)], "byte", str(prefix)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("x*")} == written
    with pytest.raises(InputError, match=r"belongs to another run.*\n.*shard_tokens was 1073741824 and is now 90000"):
        preprocess([str(source)], "byte", str(prefix), shard_tokens=90_000)
    write_jsonl(source, documents[:-1])
    with pytest.raises(InputError, match=r"a\.jsonl: has changed in its first"):
        preprocess([str(source)], "byte", str(prefix))


@contextmanager
def writes_fail_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk is full when one more shard begins."""
    begun = 0

    class Full(ShardWriter):
        def __init__(self, *arguments: Any) -> None:
            nonlocal begun
            begun += 1
            if begun > shards:
                raise OSError(errno.ENOSPC, "No space left on device", "somewhere.bin")
            super().__init__(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "ShardWriter", Full)
        yield


def test_a_full_disk_keeps_finished_shards_and_the_next_run_continues(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    arguments: tuple[Any, ...] = ([str(source)], "byte")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    preprocess(*arguments, str(whole / "x"), shard_tokens=20_000)
    with (
        writes_fail_after(3, monkeypatch),
        pytest.raises(InputError, match=r"somewhere\.bin: No space left on device; finished shards stay"),
    ):
        preprocess(*arguments, str(cut / "x"), shard_tokens=20_000)
    assert len(list(cut.glob("*-of-unfinished.bin"))) == 3
    assert journal_path(cut / "x").exists()
    assert not manifest_path(cut / "x").exists()
    with writes_fail_after(len(list(whole.glob("*.bin"))) - 3, monkeypatch):
        preprocess(*arguments, str(cut / "x"), shard_tokens=20_000)
    assert contents(cut) == contents(whole)


BAD = {
    "a bad line": (b'{"text": "x"}\n{"text": \n{"text": "y"}\n', "line 2 (byte 14): not valid JSON"),
    "no column": (b'{"text": "x"}\n{"body": "x"}\n{"text": "y"}\n', "line 2 (byte 14): no key 'text'"),
    "no text": (b'{"text": "x"}\n{"text": [1]}\n{"text": "y"}\n', "line 2 (byte 14): 'text' is list"),
    "no object": (b'{"text": "x"}\n[1]\n{"text": "y"}\n', "line 2 (byte 14): not a JSON object but list"),
    "no UTF-8": (b'{"text": "x"}\n{"text": "\xff"}\n{"text": "y"}\n', "line 2 (byte 14): not valid UTF-8 at byte 10"),
    "too long": (
        b'{"text": "x"}\n{"text": "%s"}\n{"text": "y"}\n' % (b"z" * 99),
        "line 2 (byte 14): 100 tokens, more than",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_named_or_skipped_and_counted(kind: str, workers: int, tmp_path: Path) -> None:
    content, message = BAD[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    arguments: tuple[Any, ...] = ([str(tmp_path / "a.jsonl")], "byte", str(tmp_path / "x"))
    with pytest.raises(InputError) as error:
        preprocess(*arguments, shard_tokens=50, workers=workers)
    assert f"a.jsonl, {message}" in str(error.value)
    manifest = preprocess(*arguments, shard_tokens=50, workers=workers, on_error="skip")
    assert stored(tmp_path / "x") == expected(["x", "y"])
    assert manifest.skipped.bad == 1
    assert message in manifest.skipped.named[0]


def test_damaged_files_in_the_middle_are_named_or_skipped(documents: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = write_jsonl(tmp_path / "all.jsonl", documents).read_bytes()
    for name in ("a.jsonl.gz", "b.jsonl.gz", "d.jsonl.gz"):
        (folder / name).write_bytes(gzip.compress(whole))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(whole)[:-2000])
    (folder / "c.parquet").write_bytes(b"PAR1 nothing PAR1")
    arguments: tuple[Any, ...] = ([str(folder)], "byte", str(tmp_path / "x"))
    with pytest.raises(InputError, match=r"b\.jsonl\.gz: cannot be read"):
        preprocess(*arguments, shard_tokens=100_000)
    assert len(list(tmp_path.glob("x-*-of-unfinished.bin"))) >= 1
    first = preprocess(*arguments[:2], str(tmp_path / "skipped" / "x"), shard_tokens=100_000, on_error="skip")
    assert first.skipped.bad == 2
    assert [name.split(":")[0].rpartition("/")[2] for name in first.skipped.named] == ["b.jsonl.gz", "c.parquet"]
    kept = stored(tmp_path / "skipped" / "x")
    assert kept[: len(documents)] == kept[-len(documents) :] == expected(documents)
    assert len(kept) > 2 * len(documents), "what could be read of the damaged file is kept"
    second = preprocess(*arguments[:2], str(tmp_path / "two" / "x"), shard_tokens=100_000, on_error="skip", workers=2)
    assert contents(tmp_path / "skipped") == contents(tmp_path / "two")
    assert first == second


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "saved", "lines.txt"])
def test_every_source_goes_on_from_any_place(name: str, documents: list[str], tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    documents, path = [text.replace("\n", " ") for text in documents[:60]], tmp_path / name
    plain = write_jsonl(tmp_path / "plain.jsonl", documents).read_bytes()
    if name == "saved":
        datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(path))
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=7)
    elif name == "lines.txt":
        path.write_text("\n\n".join(documents))
    else:
        path.write_bytes(gzip.compress(plain) if name.endswith("gz") else plain)
    reading = Reading("line", ("text",))
    whole = list(Source(str(path)).records(3, Place(3), reading))
    assert len(whole) == 61
    assert whole[-1].after == Place(4)
    assert whole[59].read_bytes == Source(str(path)).size
    digest = hashlib.sha256()
    for number, record in enumerate(whole[:60]):
        digest.update(record.passed)
        if number in (0, 5, 6, 7, 30, 59):
            again = Source(str(path)).records(3, record.after, reading, hashlib.sha256(), digest.hexdigest())
            assert list(again) == whole[number + 1 :]
            with pytest.raises(ChangedSourceError, match=f"has changed in its first {record.number} records"):
                next(Source(str(path)).records(3, record.after, reading, hashlib.sha256(), "another hash"))


def test_a_hub_dataset_is_streamed(documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    local = write_jsonl(tmp_path / "a.jsonl", documents)
    load = datasets.load_dataset
    asked: list[tuple[object, ...]] = []

    def from_file(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        return load("json", data_files=str(local), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", from_file)
    preprocess(["hub:someone/texts:plain:test"], "byte", str(tmp_path / "x"), shard_tokens=100_000)
    assert asked == [("someone/texts", "plain", "test", True)]
    assert stored(tmp_path / "x") == expected(documents)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"^[^ ]*a\.parquet: no column text; it has body, id$"):
        preprocess([str(tmp_path / "a.parquet")], "byte", str(tmp_path / "x"))


def test_parts_cover_every_source_once_in_order_and_merge_without_copies(documents: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(7):
        write_jsonl(folder / f"{number}.jsonl", documents[number * 20 : (number + 1) * 20])
    sources = find_sources([str(folder)]).sources
    for parts in (1, 2, 3, 5, 7):
        shares = [share_of(sources, part, parts) for part in range(1, parts + 1)]
        assert [source for share in shares for source in share] == sources
        assert all(shares)
    with pytest.raises(InputError, match="--parts is 8, but there are 7 sources"):
        share_of(sources, 1, 8)
    prefixes = [tmp_path / f"part{part}" / "x" for part in (1, 2, 3)]
    for part, prefix in enumerate(prefixes, start=1):
        preprocess([str(folder)], "byte", str(prefix), shard_tokens=20_000, part=(part, 3))
    with pytest.raises(InputError, match="expected all 3 parts of a corpus, in order, but"):
        merge(tmp_path / "whole" / "x", [prefixes[0], prefixes[2]])
    merged = merge(tmp_path / "whole" / "x", prefixes)
    assert merged.totals.documents == 140
    assert stored(tmp_path / "whole" / "x") == expected(documents[:140])
    assert list(contents(tmp_path / "whole")) == ["x.manifest.json"]
    assert list(verify(tmp_path / "whole" / "x", deep=True)) == []
    assert Corpus(str(tmp_path / "whole" / "x"), 64).tokens == merged.totals.tokens


def test_one_large_source_decides_nothing_for_the_others() -> None:
    class Sized(Source):
        size = property(lambda self: int(self.name))

    for sizes in ([1000, 1, 1, 1], [1, 1, 1, 1000], [5, 5, 5, 5], [0, 0, 0]):
        sources = [Sized(str(size)) for size in sizes]
        for parts in range(1, len(sources) + 1):
            shares = [share_of(sources, part, parts) for part in range(1, parts + 1)]
            assert [source for share in shares for source in share] == sources
            assert all(shares)


def test_verification_names_what_is_wrong(documents: list[str], tmp_path: Path) -> None:
    prefix = tmp_path / "x"
    preprocess([str(write_jsonl(tmp_path / "a.jsonl", documents))], "byte", str(prefix), shard_tokens=30_000)
    data = tmp_path / f"{Manifest.read(prefix).shards[1].name}.bin"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    (problem,) = verify(prefix)
    assert data.name in problem
    assert "sha256" in problem
    content[101] ^= 8
    data.write_bytes(content)
    assert any("but the tokenizer has 257 entries" in problem for problem in verify(prefix))
    done = run("data_tools/verify_shards.py", prefix)
    assert done.returncode == 1
    assert "problems" in done.stdout
    data.write_bytes(content[:-1])
    assert any("bytes, expected" in problem for problem in verify(prefix))


def test_the_tools_print(documents: list[str], tmp_path: Path) -> None:
    source, prefix = write_jsonl(tmp_path / "a.jsonl", documents), tmp_path / "x"
    flags = ("--input", source, "--tokenizer", "byte", "--output-prefix", prefix)
    out = run_successfully("data_tools/preprocess.py", *flags, "--dry-run")
    assert f"documents   about {len(documents)}" in out
    assert "not read" not in out
    (tmp_path / "picture.png").write_bytes(b"x")
    in_folder = ("--input", tmp_path, *flags[2:])
    assert "not read    1 " in run_successfully("data_tools/preprocess.py", *in_folder, "--dry-run")
    assert not manifest_path(prefix).exists()
    assert f"{len(documents)} documents" in run_successfully("data_tools/preprocess.py", *flags)
    assert "all well" in run_successfully("data_tools/verify_shards.py", prefix, "--deep")
    shown = run_successfully("data_tools/show_shards.py", prefix, "--document", 3, "--tokens", 10_000)
    assert documents[3] in shown
    run_successfully("data_tools/preprocess.py", *flags[:-1], tmp_path / "y")
    merged = run_successfully(
        "data_tools/merge_shards.py", prefix, tmp_path / "y", "--output-prefix", tmp_path / "both"
    )
    assert "2 shards" in merged
    twice = run("data_tools/merge_shards.py", prefix, prefix, "--output-prefix", tmp_path / "twice")
    assert (twice.returncode, "named twice" in twice.stderr) == (2, True)


@pytest.mark.parametrize("kind", ["hf", "wordpiece", "byte"])
def test_tokenizers_are_known_by_their_files(kind: str, documents: list[str], tmp_path: Path) -> None:
    import tokenizers

    spec = "byte"
    if kind == "hf":
        trained = tokenizers.ByteLevelBPETokenizer()
        trained.train_from_iterator(documents, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
        trained.save(str(tmp_path / "tokenizer.json"))
        spec = f"hf:{tmp_path / 'tokenizer.json'}"
    elif kind == "wordpiece":
        pieces = ["[PAD]", "[UNK]", "[SEP]", "Def", "def", "##s", "x", "(", ")", ":"]
        (tmp_path / "vocab.txt").write_text("\n".join(pieces))
        spec = f"wordpiece:{tmp_path / 'vocab.txt'}"
    tokenizer = load_tokenizer(spec)
    prefix = tmp_path / "out" / "x"
    preprocess([str(write_jsonl(tmp_path / "a.jsonl", documents))], spec, str(prefix))
    assert stored(prefix) == [[*tokenizer.encode(text), tokenizer.end_of_document] for text in documents]
    loaded = Corpus(str(prefix), 64).tokenizer
    assert (loaded.kind, loaded.sha256) == (kind, tokenizer.sha256)
    if kind == "wordpiece":
        assert tokenizer.encode("def (x): defs Defs [SEP]") == [4, 7, 6, 8, 9, 4, 5, 3, 5, 1, 1, 1]
        (control,) = tokenizer.encode_batch(["x [SEP]"], control=True)
        assert control.tolist() == [6, 2]
    else:
        for text in [*documents[:20], "  two  spaces\n\n\ttab\r\nÄ 漢字 🙂 end  "]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_is_trained_on_a_sample_by_seed(documents: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    trained = []
    for number, (size, seed) in enumerate(((100_000, 1), (100_000, 1), (100_000, 2), (None, 1))):
        output = tmp_path / f"{number}.model"
        train_tokenizer([str(source)], str(output), 400, sample_bytes=size, seed=seed)
        trained.append(output.read_bytes())
    assert trained[0] == trained[1]
    assert len(set(trained)) == 3
    fractions = [hash_fraction(text, "1/") for text in documents]
    assert abs(sum(fraction < 0.3 for fraction in fractions) / len(fractions) - 0.3) < 0.1


def test_ids_beyond_two_bytes_are_stored_in_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 70_000)
    (tmp_path / "a.txt").write_text("abc")
    preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / "x"))
    assert TokenShard(tmp_path / "x-00000-of-00001").dtype == "int32"
