"""What real files hold: odd bytes, odd records, odd folders. Everything is read, or counted and named."""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ecp_scale.data.manifest import Manifest
from ecp_scale.errors import InputError
from ecp_scale.preparation.finding import find_sources
from ecp_scale.preparation.formats import COMPRESSIONS, FORMATS, format_of
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.preparation.preprocessing import preprocess
from tests.launching import ROOT, environment, run
from tests.preparation.writing import stored_texts

DIGITS = b"9" * 5000
LINES: dict[str, tuple[bytes, list[str], list[str]]] = {
    "a lone surrogate": (
        b'{"text": "good one"}\n{"text": "bad \\ud83d here"}\n{"text": "good two"}\n',
        ["good one", "good two"],
        ["line 2 (byte 21): no Unicode text: lone surrogate U+D83D at character 4"],
    ),
    "an integer of 5,000 digits": (b'{"text":"a b"}\n{"text":"c d","id":%s}\n' % DIGITS, ["a b", "c d"], []),
    "a byte order mark": (b'\xef\xbb\xbf{"text":"first"}\n{"text":"second"}\n', ["first", "second"], []),
    "an array over lines": (
        b'[\n{"text":"one"},\n{"text":"two"}\n]\n',
        ["two"],
        ["line 1 (byte 0): not valid JSON", "line 2 (byte 2): not valid JSON", "line 4 (byte 33): not valid JSON"],
    ),
    "texts that are none": (
        b'{"text":12}\n{"text":["a"]}\n{"text":{"a":"b"}}\n{"other":"x"}\n[1]\n"str"\nnull\n{"text":NaN}\n{"text":"x"}\n',
        ["x"],
        [
            "line 1 (byte 0): 'text' is int, expected text",
            "line 2 (byte 12): 'text' is list",
            "line 3 (byte 27): 'text' is dict, expected text; name a key inside it: text.KEY",
            "line 4 (byte 46): no key 'text'",
            "line 5 (byte 60): not a JSON object but list",
            "line 6 (byte 64): not a JSON object but str",
            "line 7 (byte 70): not a JSON object but NoneType",
            "line 8 (byte 75): 'text' is float",
        ],
    ),
    "a key twice": (b'{"text":"one","text":"two"}\n', ["two"], []),
    "UTF-16": ('{"text":"a"}\n'.encode("utf-16-le")[:-1] + b'\n{"text":"x"}\n', ["x"], ["line 1 (byte 0): not valid"]),
    "too deep": (b'{"a":' * 100_000 + b'\n{"text":"x"}\n', ["x"], ["line 1 (byte 0): not valid JSON"]),
    "a null byte": (b'{"text":"a\\u0000b"}\n', ["a\0b"], []),
}


@pytest.mark.parametrize("kind", LINES)
def test_every_line_is_taken_or_named(kind: str, tmp_path: Path) -> None:
    content, documents, bad = LINES[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    prefix = tmp_path / "x"
    if bad:
        with pytest.raises(InputError, match=re.escape(f"a.jsonl, {bad[0]}")):
            preprocess([str(tmp_path / "a.jsonl")], "byte", str(prefix))
    manifest = preprocess([str(tmp_path / "a.jsonl")], "byte", str(prefix), on_error="skip")
    assert stored_texts(prefix) == documents
    assert manifest.skipped.bad == len(bad)
    for reason, named in zip(bad, manifest.skipped.named, strict=True):
        assert reason in named


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(lines=[b"\xef\xbb\xbf"], key="text")
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
                lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "meta", "a"]), inner),
                max_leaves=6,
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=8,
    ),
    key=st.sampled_from(["text", "meta.text", "a.a.a"]),
)
def test_no_content_raises_past_the_reader(lines: list[bytes], key: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"\n".join(lines) + b'\n{"text": "x", "meta": {"text": "x"}, "a": {"a": {"a": "x"}}}'
    )
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    arguments = ([str(tmp_path)], "byte", str(tmp_path / "out" / "x"))
    manifest = preprocess(*arguments, parsing=Parsing(key), on_error="skip")
    counted = manifest.totals.documents + manifest.skipped.dropped + manifest.skipped.bad
    content = (tmp_path / "a.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf")
    assert counted == sum(not line.isspace() and line != b"" for line in content.split(b"\n"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello text\r\nline two\r\n")
    for unit in ("file", "line"):
        preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / unit), parsing=Parsing(text_unit=unit))
        assert "".join(stored_texts(tmp_path / unit)) == "hello text\r\nline two\r\n"


def test_a_dotted_key_leads_into_objects_and_structs(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text('{"meta":{"text":"deep"}}\n{"meta.text":"as it is"}\n')
    table = pyarrow.table({"meta": [{"text": "inside"}, None], "id": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    manifest = preprocess(inputs, "byte", str(tmp_path / "x"), parsing=Parsing("meta.text"), on_error="skip")
    assert stored_texts(tmp_path / "x") == ["deep", "as it is", "inside"]
    assert manifest.skipped.bad == 1
    with pytest.raises(InputError, match=r"b\.parquet, row 1: 'meta' is dict, expected text; name a key inside it"):
        preprocess([str(tmp_path / "b.parquet")], "byte", str(tmp_path / "y"), parsing=Parsing("meta"))


def test_a_row_with_an_invalid_string_is_one_bad_record(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    binary = pyarrow.array([b"good", b"\xff\xfe", b"too", None], pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(4, *binary.buffers()[1:], binary.buffers()[0], 1)
    lists = pyarrow.array([["a"], ["b"], ["c"], ["d"]])
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "list": lists}), tmp_path / "a.parquet")
    source = [str(tmp_path / "a.parquet")]
    with pytest.raises(InputError, match=r"a\.parquet, row 2: column text: not valid UTF-8 at byte 0"):
        preprocess(source, "byte", str(tmp_path / "x"))
    manifest = preprocess(source, "byte", str(tmp_path / "x"), on_error="skip")
    assert stored_texts(tmp_path / "x") == ["good", "too"]
    assert (manifest.skipped.bad, manifest.skipped.reasons) == (1, {"without text": 1})
    with pytest.raises(InputError, match="row 1: 'list' is list, expected text"):
        preprocess(source, "byte", str(tmp_path / "y"), parsing=Parsing("list"))


@pytest.mark.parametrize(
    ("condition", "kept"),
    [("ok=true", "ac"), ("ok=False", "b"), ("n=2", "b"), ("n=2.0", "b"), ("score=0.5", "a"), ("lang=null", "c")],
)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_conditions_hold_for_booleans_and_numbers(condition: str, kept: str, form: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"text": "a", "lang": "de", "score": 0.5, "n": 1, "ok": True},
        {"text": "b", "lang": "en", "score": 1.0, "n": 2, "ok": False},
        {"text": "c", "lang": None, "score": 2.5, "n": 3, "ok": True},
    ]
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "without the key"}]))
    key, _, value = condition.partition("=")
    manifest = preprocess([str(path)], "byte", str(tmp_path / "x"), parsing=Parsing(where=((key, value),)))
    assert "".join(stored_texts(tmp_path / "x")) == kept
    missing = {f"by --where, no key {key}": 1} if form == "jsonl" else {}
    assert manifest.skipped.reasons == {f"by --where {condition}": 3 - len(kept), **missing}


def compress(content: bytes, ending: str) -> bytes:
    """Content as a file of that ending holds it."""
    from backports import zstd

    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}[ending](
        content
    )


def write(path: Path, ending: str, compression: str) -> None:
    """The documents "one" and "two, too" in a file of that format, as one text where it is plain."""
    import pyarrow
    import pyarrow.parquet

    kind, texts = FORMATS[ending], ["one", "two, too"]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        return
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
        content = path.read_bytes()
    else:
        content = ("\n".join(json.dumps(row) for row in rows) if kind == "json" else "\n".join(texts)).encode()
    path.write_bytes(compress(content, compression))


ENDINGS = [
    (ending, compression)
    for ending in FORMATS
    for compression in ("", *COMPRESSIONS)
    if FORMATS[ending] != "parquet" or not compression
]


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("ending", "compression"), ENDINGS)
def test_every_ending_is_read(ending: str, compression: str, upper: bool, tmp_path: Path) -> None:
    name = ending + compression
    path = tmp_path / "in" / f"a{name.upper() if upper else name}"
    path.parent.mkdir()
    write(path, ending, compression)
    preprocess([str(path.parent)], "byte", str(tmp_path / "x"), parsing=Parsing(text_unit="line"))
    assert [text.strip() for text in stored_texts(tmp_path / "x")] == ["one", "two, too"]


def test_the_table_of_the_docs_is_what_is_read() -> None:
    table = (ROOT / "docs" / "data.md").read_text().partition("## Inputs")[2].partition("\n\n`")[0]
    named = set(re.findall(r"`(\.\w+)`", table))
    assert named == {*FORMATS, *COMPRESSIONS}
    assert format_of("x.parquet.gz") is None


def test_a_long_window_of_zst_is_read_and_a_cut_file_is_named(tmp_path: Path) -> None:
    from backports import zstd

    options = {
        zstd.CompressionParameter.window_log: 31,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    compressor = zstd.ZstdCompressor(options=options)
    content = compressor.compress(b"some text\n" * 1000) + compressor.flush()
    (tmp_path / "a.txt.zst").write_bytes(content)
    preprocess([str(tmp_path / "a.txt.zst")], "byte", str(tmp_path / "x"))
    assert stored_texts(tmp_path / "x") == ["some text\n" * 1000]
    for ending in COMPRESSIONS:
        (tmp_path / f"c.txt{ending}").write_text("not compressed at all")
        with pytest.raises(InputError, match=rf"c\.txt{ending}: cannot be read \("):
            preprocess([str(tmp_path / f"c.txt{ending}")], "byte", str(tmp_path / f"y{ending}"))
        (tmp_path / f"b.txt{ending}").write_bytes(compress(os.urandom(30_000).hex().encode(), ending)[:-1000])
        with pytest.raises(InputError, match=rf"b\.txt{ending}: cannot be read \("):
            preprocess([str(tmp_path / f"b.txt{ending}")], "byte", str(tmp_path / f"x{ending}"))


def test_a_folder_is_read_whole_and_what_is_not_read_is_listed(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "in"
    for name in (
        "deep/c4.json.gz",
        "deep/B.TXT",
        ".git/a.txt",
        ".ipynb_checkpoints/b.txt",
        "._x.txt",
        "page.html",
        "z.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"some text")
    (folder / "deep" / "c4.json.gz").write_bytes(gzip.compress(b'{"text": "c4"}\n'))
    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(str(folder / "datasets" / "one"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    (folder / "again.txt").symlink_to(folder / "z.txt")
    os.mkfifo(folder / "pipe.txt")
    prefix = folder / "out"
    manifest = preprocess([str(folder)], "byte", str(prefix))
    assert sorted(stored_texts(prefix)) == ["c4", "far", "saved", "some text", "some text"]
    left = {reason: entry["files"] for reason, entry in manifest.unread.items()}
    assert left == {
        "a broken link": 1,
        "a link to a folder that was read already": 1,
        "not a regular file": 1,
        "of an ending that is not read": 1,
        "the same file as one before": 1,
    }
    assert preprocess([str(folder)], "byte", str(prefix)).totals == manifest.totals, "its own files are no input"


def test_folders_of_several_splits_must_be_chosen_from(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "in" / "both"))
    for name in ("in", "in/both"):
        with pytest.raises(InputError, match=r"both: holds the splits test, train; name the folder of one of them"):
            find_sources([str(tmp_path / name)])


def test_patterns_keep_the_rules_of_folders(tmp_path: Path) -> None:
    for name in ("a.jsonl", "README.md", "state.json", "out.manifest.json", "empty.txt"):
        (tmp_path / name).write_text('{"text": "x"}' if name != "empty.txt" else "")
    for name in (str(tmp_path), str(tmp_path / "*")):
        found = find_sources([name])
        assert [Path(source.name).name for source in found.sources] == ["a.jsonl", "state.json"]
        assert {reason: len(files) for reason, files in found.unread.items()} == {
            "of an ending that is not read": 1,
            "written by preprocessing": 1,
            "empty": 1,
        }
    with pytest.raises(InputError, match="File name too long"):
        find_sources(["x" * 300])


def test_rows_of_csv_are_counted_with_their_bytes_and_an_open_quote_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,one\n2\n3,\xff\n4,"two\nlines"\n5,"open\n6,six\n7,seven\n')
    manifest = preprocess([str(path)], "byte", str(tmp_path / "x"), on_error="skip")
    assert stored_texts(tmp_path / "x") == ["one", "two\nlines"]
    assert [name.partition("a.csv, ")[2] for name in manifest.skipped.named] == [
        "row 2 (byte 14): 1 fields, but the header has 2",
        "row 3 (byte 16): column text: not valid UTF-8 at character 0",
        "row 5 (byte 34): not valid CSV (unexpected end of data), with the 2 lines that follow it",
    ]
    out = run(
        "data_tools/preprocess.py", "--input", path, "--tokenizer", "byte", "--output-prefix", "y", "--dry-run"
    ).stdout
    assert "documents   about 2\n" in out


def test_a_value_out_of_range_is_one_bad_row_and_dates_and_decimals_select(tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    when = pyarrow.array([2**62, 0], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": when}), tmp_path / "a.parquet")
    parsing = Parsing(where=(("when", "1970-01-01 00:00:00"),))
    manifest = preprocess([str(tmp_path / "a.parquet")], "byte", str(tmp_path / "x"), parsing=parsing, on_error="skip")
    assert stored_texts(tmp_path / "x") == ["b"]
    assert manifest.skipped.bad == 1
    rows = {
        "text": ["a", "b"],
        "day": [datetime.date(2020, 1, n) for n in (1, 2)],
        "n": [decimal.Decimal(n) for n in ("1.5", "2.5")],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "b.parquet")
    for condition in (("day", "2020-01-02"), ("n", "2.5"), ("n", "2.50")):
        prefix = tmp_path / condition[1]
        preprocess([str(tmp_path / "b.parquet")], "byte", str(prefix), parsing=Parsing(where=(condition,)))
        assert stored_texts(prefix) == ["b"]


def test_patterns_and_the_same_file_twice(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = find_sources([str(tmp_path / "[ab].txt"), str(tmp_path / "a.txt"), str(tmp_path / "**" / "c.txt")])
    assert [Path(source.name).name for source in found.sources] == ["a.txt", "b.txt", "c.txt"]
    assert found.unread == {"the same file as one before": [str(tmp_path / "a.txt")]}
    with pytest.raises(InputError, match="no file matches it as a pattern"):
        find_sources([str(tmp_path / "x*.txt")])
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(InputError, match=r"a\.pdf: its ending is none of those that are read \(\.txt"):
        find_sources([str(tmp_path / "a.pdf")])


def test_standard_input_and_several_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("file")
    script = str(ROOT / "data_tools" / "preprocess.py")
    for number, (flags, content, documents) in enumerate(
        (
            ((), b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
            (("--stdin", ".txt"), b"a\nb\n", ["a\nb\n"]),
            (("--stdin", ".csv"), b"text,x\none,1\n", ["one"]),
        )
    ):
        prefix = tmp_path / f"x{number}"
        words = [sys.executable, script, "--input", "-", "--input", tmp_path / "a.txt", "--tokenizer", "byte", *flags]
        done = subprocess.run(
            [*map(str, words), "--output-prefix", str(prefix)], input=content, capture_output=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        assert stored_texts(prefix) == [*documents, "file"]


@pytest.mark.parametrize("prefix", [".", "..", "folder", "folder/", "/proc/nowhere/x", "file/x"])
def test_prefixes_that_cannot_be_written_are_named(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    name = prefix if prefix.startswith(("/", ".")) else f"{tmp_path}/{prefix}"
    done = run(
        "data_tools/preprocess.py", "--input", tmp_path / "a.txt", "--tokenizer", "byte", "--output-prefix", name
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert name.rstrip("/").rpartition("/x")[0] in done.stderr


def test_many_sources_are_told_in_few_lines(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:05d}.txt").write_text(f"text {number}")
    preprocess([str(folder)], "byte", str(tmp_path / "x"))
    (folder / "one-more.txt").write_text("x")
    with pytest.raises(InputError) as error:
        preprocess([str(folder)], "byte", str(tmp_path / "x"))
    assert f"sources: 1 more ({folder / 'one-more.txt'})" in str(error.value)
    assert str(error.value).count("\n") <= 10
    shown = run("data_tools/show_shards.py", tmp_path / "x").stdout
    assert shown.count("\n") < 30
    assert "and 295 more" in shown
    assert len(Manifest.read(tmp_path / "x").sources) == 300
