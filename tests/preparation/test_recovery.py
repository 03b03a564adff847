"""One writer at a time, and what is left of a run that was killed, stopped, or whose sources have changed."""

import errno
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ecp_scale import files
from ecp_scale.cluster.lock import only_writer
from ecp_scale.data.manifest import Manifest, manifest_path
from ecp_scale.errors import InputError
from ecp_scale.preparation import outputs, preprocessing, sources
from ecp_scale.preparation.encoding import Encoder, Encoding
from ecp_scale.preparation.interrupts import Interrupts
from ecp_scale.preparation.journal import Journal, journal_path
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.preparation.sources import Source
from ecp_scale.preparation.verification import verify
from tests.corpus import ShardedText
from tests.launching import ROOT, environment
from tests.preparation.writing import contents, expected, stored, stored_texts, write_jsonl

TEXTS = [f"document number {number} of some length" for number in range(4000)]


def command(source: Path, prefix: Path, *flags: object) -> list[str]:
    """A run of the program."""
    script = str(ROOT / "data_tools" / "preprocess.py")
    words = (sys.executable, script, "--input", source, "--tokenizer", "byte", "--output-prefix", prefix, *flags)
    return [str(word) for word in words]


def start(words: Sequence[str]) -> "subprocess.Popen[str]":
    """The program in a session of its own, as a terminal starts it."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def test_of_two_writers_of_a_prefix_one_finishes_and_one_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    rng = random.Random(3)
    all_refused = 0
    for attempt in range(10):
        prefix = tmp_path / str(attempt) / "x"
        flags = ("--shard-tokens", 20_000, "--workers", 1 + attempt % 2)
        first = start(command(source, prefix, *flags))
        time.sleep(rng.uniform(0, 0.7))
        second = start(command(source, prefix, *flags))
        ends = [(process.communicate(timeout=120)[1], process.returncode) for process in (first, second)]
        refused = [error for error, code in ends if code]
        # A second one that comes when the first has ended finds its work done.
        assert len(refused) <= 1, ends
        all_refused += len(refused)
        for error in refused:
            assert "is being written by process" in error
            assert " on " in error
            assert "Traceback" not in error
        assert list(verify(prefix, deep=True)) == []
        assert len(stored(prefix)) == 5 * len(TEXTS)
    assert all_refused >= 5, "the two hardly met"


def test_the_lock_names_its_holder_and_covers_both_outputs_and_merging(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    holder = f"is being written by process {os.getpid()} on "
    with only_writer([tmp_path / "x"]), pytest.raises(InputError, match=holder):
        preprocess([str(source)], "byte", str(tmp_path / "x"))
    with only_writer([tmp_path / "x-validation"]), pytest.raises(InputError, match=holder):
        preprocess([str(source)], "byte", str(tmp_path / "x"), validation_share=0.1)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_behind(kind: signal.Signals, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    rng = random.Random(int(kind))
    moments = [rng.uniform(0.4, 1.8) for _ in range(10)]

    def ended(attempt: int) -> tuple[int, str]:
        process = start(command(source, tmp_path / str(attempt) / "x", "--shard-tokens", 20_000, "--workers", 2))
        time.sleep(moments[attempt])
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        if kind == signal.SIGINT:
            os.killpg(process.pid, kind)  # as a terminal does: all of them get it
        else:
            process.send_signal(kind)
        _, error = process.communicate(timeout=30)
        deadline = time.monotonic() + 5
        while (left := [pid for pid in family if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, [psutil.Process(pid).cmdline() for pid in left]
        return process.returncode, error

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(ended, range(10)))
    if kind == signal.SIGINT:
        answered = [(code, error) for code, error in ends if "interrupted" in error]
        assert len(answered) >= 5, "most came before there was anything to interrupt"
        for code, error in answered:
            assert (code, "Traceback" in error) == (130, False), error


def test_ctrl_c_while_a_worker_starts_waits_until_it_has() -> None:
    asked, sent = threading.Event(), threading.Event()

    def send() -> None:  # from a thread whose mask does not block the signal, as those of libraries
        asked.wait(20)
        signal.raise_signal(signal.SIGINT)
        sent.set()

    class Pool:
        done = False

        def submit(self, function: object, batch: object) -> None:
            asked.set()
            assert sent.wait(20)
            time.sleep(0.01)
            self.done = True

    thread, pool = threading.Thread(target=send), Pool()
    thread.start()
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        Encoder(Encoding("byte"), 1, interrupts)._submit(pool, [])
    thread.join()
    assert pool.done


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_stopping_twice_at_the_same_place_loses_nothing(share: float, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = source.read_bytes()
    options: Any = {"shard_tokens": 30_000, "validation_share": share}
    preprocess([str(source)], "byte", str(tmp_path / "whole" / "x"), **options)
    source.write_bytes(whole.replace(b'"document number 2000 ', b"document number 2000 "))
    for _ in range(3):
        with pytest.raises(InputError, match=r"line 2001 \(byte \d+\): not valid JSON"):
            preprocess([str(source)], "byte", str(tmp_path / "cut" / "x"), **options)
    source.write_bytes(whole)
    preprocess([str(source)], "byte", str(tmp_path / "cut" / "x"), **options)
    assert same_but_for_times(tmp_path / "cut", tmp_path / "whole")


def same_but_for_times(one: Path, other: Path) -> bool:
    """Whether two folders hold the same, but for the times of change of the sources in their manifests."""
    contents_of = [
        {name: re.sub(rb'"fingerprint": "[^"]*"', b"", content) for name, content in contents(folder).items()}
        for folder in (one, other)
    ]
    return contents_of[0] == contents_of[1]


@pytest.mark.parametrize("moment", ["fsync", "publish", "add", "finish"])
def test_ctrl_c_at_any_moment_of_writing_neither_repeats_nor_loses(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options: Any = {"shard_tokens": 20_000}
    preprocess([str(source)], "byte", str(tmp_path / "whole" / "x"), **options)
    owner: Any = {
        "fsync": os,
        "publish": outputs,
        "add": outputs.ShardWriter,
        "finish": outputs.ShardWriter,
    }[moment]
    original, calls = getattr(owner, moment), 0

    def interrupted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*given, **named)
        if calls % 7 == 3:
            signal.raise_signal(signal.SIGINT)
        return result

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, interrupted)
            with suppress(KeyboardInterrupt):
                preprocess([str(source)], "byte", str(tmp_path / "cut" / "x"), **options)
    preprocess([str(source)], "byte", str(tmp_path / "cut" / "x"), **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_begun_shard_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:100])
    stop_after(100, source, tmp_path / "x")
    (path,) = tmp_path.glob(".x-*.bin.tmp")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"\.bin\.tmp: 500 bytes, but the journal says that \d+ were written"):
        preprocess([str(source)], "byte", str(tmp_path / "x"))


def test_a_saved_dataset_that_was_edited_and_another_standard_input_are_noticed(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["an old text", "b"]}).save_to_disk(str(folder))
    preprocess([str(folder)], "byte", str(tmp_path / "x"))
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes().replace(b"an old text", b"a new text!"))
    with pytest.raises(InputError, match="saved: has changed in its first 2 records"):
        preprocess([str(folder)], "byte", str(tmp_path / "x"))
    for number, (content, code) in enumerate(((b"one", 0), (b"one", 0), (b"two", 2))):
        words = command(Path("-"), tmp_path / "y", "--stdin", ".txt")
        done = subprocess.run(words, input=content, capture_output=True, env=environment())
        assert done.returncode == code, (number, done.stderr)


def test_a_source_that_grew_under_a_finished_prefix_is_told(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:10])
    preprocess([str(source)], "byte", str(tmp_path / "x"))
    source.write_bytes(source.read_bytes() + b'{"text": "more"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: has grown behind its first 10 records"):
        preprocess([str(source)], "byte", str(tmp_path / "x"))


def test_a_damaged_file_that_was_skipped_may_be_touched(tmp_path: Path) -> None:
    whole = gzip.compress(write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-2000])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing PAR1")
    arguments: Any = (
        [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")],
        "byte",
        str(tmp_path / "x"),
    )
    first = preprocess(*arguments, on_error="skip")
    assert first.skipped.bad == 2
    for name in ("b.jsonl.gz", "c.parquet"):
        (tmp_path / name).touch()
    assert preprocess(*arguments, on_error="skip").totals == first.totals


def test_a_share_of_a_share_is_a_share(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for share in ((0.0, 0.3), (0.3, 1.0)):
        prefix = tmp_path / str(share[0]) / "x"
        preprocess([str(source)], "byte", str(prefix), parsing=Parsing(share=share), validation_share=0.1)
        counts = [len(stored(prefix.with_name(f"x-{side}"))) for side in ("train", "validation")]
        assert 0.06 < counts[1] / sum(counts) < 0.14


def test_after_ctrl_c_a_run_goes_on_with_the_document_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole, cut = tmp_path / "whole" / "x", tmp_path / "cut" / "x"
    preprocess([str(source)], "byte", str(whole))
    add, taken = preprocessing.Outputs.add, 0

    def interrupted(self: Any, *arguments: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == 1000:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preprocessing.Outputs, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preprocess([str(source)], "byte", str(cut))
    assert Journal.read_from(journal_path(cut)).begun[0].documents == 999
    preprocess([str(source)], "byte", str(cut))
    assert contents(cut.parent) == contents(whole.parent)


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("shard_tokens", [20_000, 1 << 30])
def test_a_repaired_record_goes_on_and_only_what_was_not_read_is_read(
    share: float, shard_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", TEXTS[number * 1000 : (number + 1) * 1000])
    good = (folder / "2.jsonl").read_text().splitlines(True)
    arguments: Any = {"shard_tokens": shard_tokens, "validation_share": share}
    preprocess([str(folder)], "byte", str(tmp_path / "whole" / "x"), **arguments)
    (folder / "2.jsonl").write_text("".join([*good[:500], '{"text": "half', *good[500:]]))
    with pytest.raises(InputError, match=r"2\.jsonl, line 501 \(byte \d+\): not valid JSON"):
        preprocess([str(folder)], "byte", str(tmp_path / "cut" / "x"), **arguments)
    (folder / "2.jsonl").write_text("".join(good))
    read: list[tuple[str, int]] = []
    records = Source.records

    def watched(self: Source, number: int, start: Any, *rest: Any) -> Any:
        read.append((Path(self.name).name, start.record))
        return records(self, number, start, *rest)

    monkeypatch.setattr(sources.Source, "records", watched)
    preprocess([str(folder)], "byte", str(tmp_path / "cut" / "x"), **arguments)
    assert read == [("2.jsonl", 500), ("3.jsonl", 0)]
    written = [contents(tmp_path / name) for name in ("whole", "cut")]
    for files_of_run in written:
        for name in [name for name in files_of_run if name.endswith("manifest.json")]:
            manifest = json.loads(files_of_run.pop(name))
            assert manifest["totals"]["documents"] > 500
    assert written[0] == written[1]


def stop_after(documents: int, source: Path, prefix: Path) -> None:
    """A run that stops at a bad record at the end of a source."""
    whole = source.read_bytes()
    source.write_bytes(whole + b"{\n")
    with pytest.raises(InputError, match="not valid JSON"):
        preprocess([str(source)], "byte", str(prefix))
    assert Journal.read_from(journal_path(prefix)).begun[0].documents == documents
    source.write_bytes(whole)


def test_a_source_that_changed_where_it_was_read_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:100])
    stop_after(100, source, tmp_path / "x")
    content = source.read_bytes()
    source.write_bytes(content.replace(b"number 7 ", b"number 8 "))
    with pytest.raises(InputError, match=r"a\.jsonl: has changed in its first 100 records \(\d+ bytes\)"):
        preprocess([str(source)], "byte", str(tmp_path / "x"))
    source.write_bytes(content[:-50])
    with pytest.raises(InputError, match="has changed"):
        preprocess([str(source)], "byte", str(tmp_path / "x"))
    source.write_bytes(content + b'{"text": "one more"}\n')
    manifest = preprocess([str(source)], "byte", str(tmp_path / "x"))
    assert stored_texts(tmp_path / "x") == [*TEXTS[:100], "one more"]
    assert manifest.sources[0].bytes == source.stat().st_size
    source.write_bytes(content.replace(b"number 7 ", b"number 8 ") + b'{"text": "one more"}\n')
    with pytest.raises(InputError, match="has changed"):
        preprocess([str(source)], "byte", str(tmp_path / "x"))


def test_an_earlier_source_that_changed_is_refused_and_one_that_was_copied_is_not(tmp_path: Path) -> None:
    first, second = (write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[:50]) for name in "ab")
    whole = second.read_bytes()
    second.write_bytes(whole + b"{\n")
    arguments: Any = ([str(first), str(second)], "byte", str(tmp_path / "x"))
    with pytest.raises(InputError, match="not valid JSON"):
        preprocess(*arguments)
    second.write_bytes(whole)
    content = first.read_bytes()
    first.write_bytes(content.replace(b"number 7 ", b"number 8 "))
    with pytest.raises(InputError, match=r"a\.jsonl: has changed in its first 50 records"):
        preprocess(*arguments)
    first.write_bytes(content)  # the same content at another time
    assert preprocess(*arguments).totals.documents == 100


def test_a_file_that_grows_meanwhile_has_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    add = preprocessing.Outputs.add

    def growing(self: Any, *arguments: Any) -> None:
        with source.open("a") as file:
            file.write('{"text": "late"}\n')
        add(self, *arguments)

    monkeypatch.setattr(preprocessing.Outputs, "add", growing)
    (record,) = preprocess([str(source)], "byte", str(tmp_path / "x")).sources
    read = source.read_bytes()[: record.bytes]
    assert record.records == read.count(b"\n") == len(stored(tmp_path / "x"))
    assert record.sha256 == files.hashlib.sha256(read).hexdigest()


@pytest.mark.parametrize("moment", ["commit", "publish", "finish", "manifest"])
def test_a_crash_between_two_writes_loses_nothing(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments: Any = ([str(source)], "byte")
    options: Any = {"shard_tokens": 30_000, "validation_share": 0.1}
    preprocess(*arguments, str(tmp_path / "whole" / "x"), **options)
    target, name = {
        "commit": (Journal, "append"),
        "publish": ("ecp_scale.preparation.outputs", "publish"),
        "finish": (preprocessing, "_name_shard"),
        "manifest": (Manifest, "write"),
    }[moment]
    for attempt in range(1, 4):
        with monkeypatch.context() as patch:
            owner = sys.modules[target] if isinstance(target, str) else target
            original, calls = getattr(owner, name), 0

            def dies(*given: Any, original: Any = original, attempt: int = attempt, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > attempt:
                    raise RuntimeError("killed")
                return original(*given, **named)

            patch.setattr(owner, name, dies)
            try:
                preprocess(*arguments, str(tmp_path / "cut" / "x"), **options)
            except RuntimeError:
                continue
    preprocess(*arguments, str(tmp_path / "cut" / "x"), **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_journal_appends_and_survives_a_cut_line(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    content = source.read_bytes()
    source.write_bytes(content + b"{\n")
    preprocess([str(source)], "byte", str(tmp_path / "whole" / "x"), shard_tokens=10_000, on_error="skip")
    arguments: Any = ([str(source)], "byte", str(tmp_path / "cut" / "x"))
    with pytest.raises(InputError):
        preprocess(*arguments, shard_tokens=10_000)
    path = journal_path(tmp_path / "cut" / "x")
    lines = path.read_bytes().splitlines(True)
    assert len(lines) > 10
    assert max(map(len, lines[1:])) < 1500, "an entry holds what is new"
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    preprocess(*arguments, shard_tokens=10_000, on_error="skip")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_full_disk_names_the_copy_of_the_tokenizer(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.shutil, "copyfileobj", full)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:10])
    with pytest.raises(
        InputError, match=r"^[^ ]*/out/x\.tokenizer\.model: No space left on device; finished shards stay"
    ):
        preprocess([str(source)], f"sentencepiece:{sharded_text.tokenizer}", str(tmp_path / "out" / "x"))
    monkeypatch.undo()
    preprocess([str(source)], f"sentencepiece:{sharded_text.tokenizer}", str(tmp_path / "out" / "x"))
    assert manifest_path(tmp_path / "out" / "x").exists()


def test_validation_and_training_hold_every_document_once(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *TEXTS[:100]])
    for workers in (1, 2):
        prefix = tmp_path / str(workers) / "x"
        preprocess([str(source)], "byte", str(prefix), validation_share=0.05, shard_tokens=30_000, workers=workers)
    train, validation = (stored(tmp_path / "1" / f"x-{side}") for side in ("train", "validation"))
    assert sorted(train + validation) == sorted(expected([*TEXTS, *TEXTS[:100]]))
    assert 0.03 < len(validation) / len(TEXTS) < 0.07
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in validation}, "a duplicate is on the same side"
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("books", [1, 2, 16])
def test_few_documents_are_shared_out_by_blocks(books: int, sharded_text: ShardedText, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"BOOK {n}\n" + sharded_text.documents[n % 5][n * 100 :] for n in range(books)]
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.txt").write_text(text)
    spec = f"sentencepiece:{sharded_text.tokenizer}"
    for workers in (1, 2):
        prefix = tmp_path / str(workers) / "x"
        preprocess([str(folder)], spec, str(prefix), validation_share=0.01, workers=workers)
    train, validation = (Manifest.read(tmp_path / "1" / f"x-{side}").totals for side in ("train", "validation"))
    assert train.bytes + validation.bytes == sum(len(text.encode()) for text in texts)
    assert validation.documents >= 1
    assert train.documents >= books
    assert 0.002 < validation.bytes / train.bytes < 0.05
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    for side in ("train", "validation"):
        assert list(verify(tmp_path / "1" / f"x-{side}", deep=True)) == []


def test_too_little_to_share_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match=r"--validation-share 0\.01 leaves nothing for .* 1 documents in"):
        preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / "x"), validation_share=0.01)
    with pytest.raises(InputError, match=r"1 records dropped \(1 by --share\)"):
        preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / "y"), parsing=Parsing(share=(0.5, 0.51)))
