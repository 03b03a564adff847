"""Where documents come from: files, folders and hub datasets, as streams of raw records that can begin anywhere.

A record is what one document is parsed from: a line, a block of lines, a whole file, or the row of a table. Reading and
parsing are apart, so that parsing can happen in worker processes. No reader holds more than a record or a row group.
"""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from ecp_scale.errors import InputError

Raw: TypeAlias = bytes | dict[str, Any]
"""A record as it was read: text, a line of JSON, or the columns of a row."""
Row: TypeAlias = tuple[int, dict[str, Any], int]
"""Number of a row from 1, its columns, and the bytes of the source up to there."""
TextUnit = Literal["file", "block", "line", "article"]
TEXT_SUFFIXES = (".txt", ".tokens", ".raw")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")
HUB = "hub:"
ROWS_AT_A_TIME = 1024
READ_BYTES = 1 << 20
"""Python's own 8 KiB would cut most documents into several reads."""


@dataclass(frozen=True)
class Place:
    """A point between two records: ``record`` records of source number ``source`` lie before it.

    ``offset`` is the byte at which a plain file goes on there; 0 where records must be counted.
    """

    source: int = 0
    record: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Record:
    """A raw record, what to call it in an error, the place after it, and the bytes of the source read up to there."""

    raw: Raw
    name: str
    after: Place
    read_bytes: int


@dataclass(frozen=True)
class Reading:
    """How records are cut: the unit of a document in plain text, and the columns that a table must have."""

    text_unit: TextUnit = "file"
    columns: tuple[str, ...] = ("text",)


@dataclass(frozen=True)
class Source:
    """One input: a file, a folder written by ``datasets``, or a dataset of the hub (``hub:NAME[:CONFIG[:SPLIT]]``)."""

    name: str

    @property
    def path(self) -> Path | None:
        """The file or folder; None for the hub."""
        return None if self.name.startswith(HUB) else Path(self.name)

    @property
    def is_json(self) -> bool:
        """Whether a record is a line of JSON."""
        return self.name.endswith(JSON_SUFFIXES)

    @property
    def size(self) -> int:
        """Bytes on disk, 0 for the hub."""
        if self.path is None:
            return 0
        files = self.path.rglob("*.arrow") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)

    def records(self, number: int, start: Place, reading: Reading) -> Iterator[Record]:
        """Records from ``start`` on, as source ``number`` of a corpus.

        Raises:
            InputError: naming the source, where it cannot be read.
        """
        try:
            if self.path is not None and self.path.is_file() and not self.name.endswith(".parquet"):
                yield from self._text_records(number, start, reading)
                return
            read_rows = self._parquet_rows if self.name.endswith(".parquet") else self._dataset_rows
            for record, row, read in read_rows(start.record, reading):
                yield Record(row, f"{self.name}, row {record}", Place(number, record), read)
        except InputError:
            raise
        except (OSError, EOFError, zlib.error, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.name}: cannot be read ({reason})") from error

    def _text_records(self, number: int, start: Place, reading: Reading) -> Iterator[Record]:
        assert self.path is not None
        compressed = self.name.endswith((".gz", ".zst"))
        with self.path.open("rb", READ_BYTES) as disk, _decompressed(disk, self.name) as file:
            record, offset = 0, 0
            if start.record and not compressed:
                record, offset = start.record, start.offset
                file.seek(offset)
            what = "line" if self.is_json else reading.text_unit
            for raw in CUTS[what](file):
                record, offset = record + 1, offset + len(raw)
                if record > start.record and raw and not raw.isspace():
                    name = self.name if what == "file" else f"{self.name}, {what} {record}"
                    read = disk.tell() if compressed else offset
                    yield Record(raw, name, Place(number, record, 0 if compressed else offset), read)

    def _parquet_rows(self, skipped: int, reading: Reading) -> Iterator[Row]:
        import pyarrow.parquet

        assert self.path is not None
        with pyarrow.parquet.ParquetFile(self.path) as file:
            self._check_columns(file.schema_arrow.names, reading)
            done, size = 0, self.size
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if done + rows <= skipped:
                    done += rows
                    continue
                for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=list(reading.columns)):
                    for row in batch.to_pylist():
                        done += 1
                        if done > skipped:
                            yield done, row, size * done // file.metadata.num_rows

    def _dataset_rows(self, skipped: int, reading: Reading) -> Iterator[Row]:
        try:
            import datasets
        except ImportError as error:
            raise InputError(f"{self.name}: needs `datasets`: pip install 'ecp-scale[data]'") from error
        if self.path is not None:
            data = datasets.load_from_disk(str(self.path))
            if isinstance(data, datasets.DatasetDict):
                raise InputError(f"{self.name}: holds the splits {', '.join(data)}; name the folder of one of them")
            rows, size = len(data), self.size
            if skipped >= rows:  # which skip() refuses
                return
        else:
            name, _, rest = self.name.removeprefix(HUB).partition(":")
            config, _, split = rest.partition(":")
            data = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            rows, size = 1, 0
        if data.column_names is not None:
            self._check_columns(data.column_names, reading)
        for done, row in enumerate(data.skip(skipped), start=skipped + 1):
            yield done, {name: row[name] for name in reading.columns}, size * done // rows

    def _check_columns(self, found: Sequence[str], reading: Reading) -> None:
        missing = [name for name in reading.columns if name not in found]
        if missing:
            raise InputError(f"{self.name}: no column {', '.join(missing)}; it has {', '.join(found)}")


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Files named directly or lying anywhere below a named folder, in sorted order; dataset folders; hub datasets.

    Raises:
        InputError: if an input is missing or of another kind, or there is nothing to read at all.
    """
    sources: list[Source] = []
    for name in inputs:
        path = Path(name)
        if name.startswith(HUB):
            sources.append(Source(name))
        elif path.is_dir():
            sources += _below(path)
        elif not path.is_file():
            raise InputError(f"input {name}: no such file or folder")
        elif not name.endswith(SUFFIXES):
            raise InputError(f"input {name}: ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
        else:
            sources.append(Source(name))
    if not any(source.size for source in sources if source.path is not None) and not any(
        source.path is None for source in sources
    ):
        raise InputError(f"the corpus is empty: {len(sources)} files with text in {', '.join(inputs) or 'no inputs'}")
    return sources


def _below(folder: Path) -> list[Source]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [Source(str(folder))]
    return [Source(str(file)) for file in sorted(folder.rglob("*")) if file.name.endswith(SUFFIXES) and file.is_file()]


def _decompressed(disk: BinaryIO, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=disk)
    if name.endswith(".zst"):
        try:
            import pyarrow
        except ImportError as error:
            raise InputError(f"{name}: needs `pyarrow`: pip install 'ecp-scale[data]'") from error
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(disk, "r"), "zstd"))
    return disk


ARTICLE = re.compile(rb" = [^=].* = *\n?")
"""The title line of an article of WikiText; its sections have more signs."""


def _whole(file: Any) -> Iterator[bytes]:
    yield file.read()


def _lines(file: Any) -> Iterator[bytes]:
    return iter(file)


def _articles(file: Any) -> Iterator[bytes]:
    """Runs of lines that begin with a title; what stands before the first title is one of its own."""
    article: list[bytes] = []
    for line in file:
        if ARTICLE.fullmatch(line) and any(part.strip() for part in article):
            yield b"".join(article)
            article = []
        article.append(line)
    if article:
        yield b"".join(article)


def _blocks(file: Any) -> Iterator[bytes]:
    """Runs of lines that blank lines separate; the blank ones belong to the block before them."""
    block: list[bytes] = []
    ended = False
    for line in file:
        blank = not line.strip()
        if ended and not blank:
            yield b"".join(block)
            block, ended = [], False
        block.append(line)
        ended = ended or (blank and any(part.strip() for part in block))
    if block:
        yield b"".join(block)


CUTS: dict[str, Callable[[Any], Iterator[bytes]]] = {
    "file": _whole,
    "block": _blocks,
    "line": _lines,
    "article": _articles,
}
"""How each unit of text is cut out of an open file; joined again, the pieces are the file."""
