"""Where documents come from: files, folders, standard input and hub datasets, as records that can begin anywhere.

A record is what one document is parsed from: a line, a block of lines, a whole file, or the row of a table. Reading and
parsing are apart, so that parsing can happen in worker processes. No reader holds more than a record or a row group,
and of a long plain text no more than a part.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ecp_scale.errors import InputError
from ecp_scale.preparation.formats import COMPRESSIONS, Format, compression_of, format_of
from ecp_scale.preparation.tables import BadRow, Row, csv_rows, hub_rows, parquet_rows, saved_rows
from ecp_scale.preparation.text_units import READ_BYTES, TextUnit, texts

Raw: TypeAlias = bytes | dict[str, Any] | BadRow
"""A record as it was read: text, a line of JSON, or the columns of a row."""
HUB = "hub:"
STDIN = "-"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ChangedSourceError(InputError):
    """A source whose content is no longer what an earlier run has read of it."""


class Place(NamedTuple):
    """A point between two records: ``record`` records of source number ``source`` lie before it.

    ``offset`` counts the bytes of (decompressed) content before it.
    """

    source: int = 0
    record: int = 0
    offset: int = 0


class Record(NamedTuple):
    """A raw record, what to call it in an error, and the place after it.

    ``passed`` is all content since the record before, by whose hash a source is known; ``read_bytes`` the bytes on disk
    up to there. ``part``: the text is long and comes in several, of which the ``last`` ends it.
    """

    raw: Raw
    source: str
    what: str
    number: int
    at: int | None
    after: Place
    passed: bytes
    read_bytes: int
    part: bool = False
    last: bool = True

    @property
    def name(self) -> str:
        """Source, number, and byte offset."""
        place = "" if self.at is None else f" (byte {self.at})"
        return self.source if self.what in ("file", "end") else f"{self.source}, {self.what} {self.number}{place}"


@dataclass(frozen=True)
class Reading:
    """How records are cut: the unit of a document in plain text, and the columns that a table must have."""

    text_unit: TextUnit = "file"
    columns: tuple[str, ...] = ("text",)
    stdin: str = ".jsonl"
    """What standard input holds, as the ending of a file would say it."""


@dataclass(frozen=True)
class Source:
    """One input: a file, ``-``, a folder written by ``datasets``, or a hub dataset (``hub:NAME[:CONFIG[:SPLIT]]``)."""

    name: str

    @property
    def path(self) -> Path | None:
        """The file or folder; None for standard input and the hub."""
        return None if self.name == STDIN or self.name.startswith(HUB) else Path(self.name)

    def format(self, reading: Reading) -> Format | None:
        """The format of a file; None for datasets."""
        return format_of(self._file_name(reading))

    def _file_name(self, reading: Reading) -> str:
        return reading.stdin if self.name == STDIN else self.name

    @cached_property
    def size(self) -> int:
        """Bytes on disk when first asked for, 0 where that is not known."""
        if self.path is None:
            return 0
        files = self.path.rglob("*.arrow") if self.path.is_dir() else [self.path]
        with suppress(OSError):
            return sum(file.stat().st_size for file in files)
        return 0

    @cached_property
    def fingerprint(self) -> str:
        """Sizes and times of change when first asked for, which tell without reading that all is as it was."""
        if self.path is None:
            return ""
        files = sorted(file for file in self.path.rglob("*") if file.is_file()) if self.path.is_dir() else [self.path]
        with suppress(OSError):
            marks = [f"{status.st_size}:{status.st_mtime_ns}" for status in map(Path.stat, files)]
            return marks[0] if len(marks) == 1 else hashlib.sha256(" ".join(marks).encode()).hexdigest()
        return ""

    def records(
        self,
        number: int,
        start: Place,
        reading: Reading,
        digest: "hashlib._Hash | None" = None,
        seen: str | None = None,
    ) -> Iterator[Record]:
        """Records from ``start`` on, as source ``number`` of a corpus; the last is empty and leads to the next source.

        Args:
            number: of the source.
            start: where to begin.
            reading: how records are cut.
            digest: what lies before ``start`` is hashed into it.
            seen: what the hash must then be; None checks nothing.

        Raises:
            ChangedSourceError: if what lies before ``start`` is not what was read of it in an earlier run.
            InputError: naming the source, where it cannot be read.
        """
        digest = hashlib.sha256() if digest is None else digest
        _ = self.fingerprint  # of the file as it is when it is opened
        is_text = self.format(reading) in ("text", "json")
        with self.reading_errors(start.offset) as passed:
            for record in (self._text_records if is_text else self._row_records)(number, start, reading, digest):
                if seen is not None and digest.hexdigest() != seen:
                    raise ChangedSourceError(self.changed(start))
                seen = None
                passed[0] = max(passed[0], record.after.offset)
                yield record

    @contextmanager
    def reading_errors(self, offset: int = 0) -> Iterator[list[int]]:
        """Turn what reading raises into an error that names the source and the byte of content that was reached."""
        passed = [offset]
        try:
            yield passed
        except InputError:
            raise
        except Exception as error:  # Every format has errors of its own, and each is about the content.
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"{self.name}: cannot be read ({reason}) behind byte {passed[0]}") from error

    def changed(self, place: Place) -> str:
        """What to say of a source whose content is no longer what was read of it."""
        return (
            f"{self.name}: has changed in its first {place.record} records ({place.offset} bytes), which an earlier "
            "run has read; restore it, or choose another prefix"
        )

    def _text_records(self, number: int, start: Place, reading: Reading, digest: "hashlib._Hash") -> Iterator[Record]:
        what = "line" if self.format(reading) == "json" else reading.text_unit
        compressed = bool(compression_of(self._file_name(reading))) and self.name != STDIN
        with self.opened(reading) as (disk, file):
            _pass_over(file, start.offset, digest)
            count, offset = start.record, start.offset
            blank: list[bytes] = []
            pieces = ((line, False, True) for line in file) if self.format(reading) == "json" else texts(file, what)
            for content, part, last in pieces:
                at, offset, count = offset, offset + len(content), count + last
                raw = content.removeprefix(BYTE_ORDER_MARK) if at == 0 else content
                if what != "file" and not part and (not raw or raw.isspace()):
                    blank.append(content)
                    continue
                after, read = Place(number, count, offset), disk.tell() if compressed else offset
                passed = b"".join((*blank, content)) if blank else content
                blank.clear()
                yield Record(raw, self.name, what, count + (not last), at, after, passed, read, part, last)
            yield Record(b"", self.name, "end", count, None, Place(number + 1), b"".join(blank), offset)

    def _row_records(self, number: int, start: Place, reading: Reading, digest: "hashlib._Hash") -> Iterator[Record]:
        count, offset, read = 0, 0, 0
        for row, read, at in self.rows(reading):
            count += 1
            passed = _bytes_of(row)
            offset += len(passed)
            if count <= start.record:
                digest.update(passed)
            else:
                yield Record(row, self.name, "row", count, at, Place(number, count, offset), passed, read)
        yield Record(b"", self.name, "end", count, None, Place(number + 1), b"", read)

    def rows(self, reading: Reading) -> Iterator[Row]:
        """Rows of a table, the bytes on disk read up to each, and the byte where it begins, if that is known."""
        columns = reading.columns
        if self.format(reading) == "csv":
            with self.opened(reading) as (disk, file):
                tell = None if disk is file or self.path is None else disk.tell
                yield from csv_rows(self.name, file, columns, tell)
        elif self.path is None:
            yield from hub_rows(self.name.removeprefix(HUB), columns)
        elif self.path.is_dir():
            yield from saved_rows(self.path, columns, self.size)
        else:
            yield from parquet_rows(self.path, columns)

    @contextmanager
    def opened(self, reading: Reading) -> Iterator[tuple[Any, Any]]:
        """The file on disk, and its decompressed content."""
        compression = compression_of(self._file_name(reading))
        disk = sys.stdin.buffer if self.path is None else self.path.open("rb", READ_BYTES)
        try:
            yield disk, COMPRESSIONS[compression](disk) if compression else disk
        finally:
            if self.path is not None:
                disk.close()


def content_hash(source: Source, reading: Reading, until: Place) -> str:
    """Hash of what lies before a place of a source; nothing behind it is read.

    Raises:
        InputError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with source.reading_errors():
        if source.format(reading) in ("text", "json"):
            with source.opened(reading) as (_, file):
                _pass_over(file, until.offset, digest)
        else:
            for row, _, _ in itertools.islice(source.rows(reading), until.record):
                digest.update(_bytes_of(row))
    return digest.hexdigest()


def has_more(source: Source, reading: Reading, place: Place) -> bool:
    """Whether a record can be read behind a place of a source."""
    try:
        return next(source.records(place.source, place, reading)).what != "end"
    except InputError:
        return False


def _bytes_of(row: dict[str, Any] | BadRow) -> bytes:
    content = row.reason if isinstance(row, BadRow) else json.dumps(row, ensure_ascii=False, default=str)
    return content.encode("utf-8", "surrogatepass")


def _pass_over(file: Any, count: int, digest: "hashlib._Hash") -> None:
    while count and (block := file.read(min(count, READ_BYTES))):
        digest.update(block)
        count -= len(block)
