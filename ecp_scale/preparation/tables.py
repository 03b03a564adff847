"""Rows of tables: parquet, CSV, folders that ``datasets`` saved, and datasets of the hub."""

import codecs
import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ecp_scale.errors import InputError

ROWS_AT_A_TIME = 1024


class BadRow(NamedTuple):
    """A row that cannot be read, and why."""

    reason: str


Row: TypeAlias = tuple[dict[str, Any] | BadRow, int, int | None]
"""The columns of a row, the bytes on disk read up to there, and the byte of the content where it begins, if known."""


def top_level(key: str, names: Sequence[str]) -> str:
    """The column that holds a key: itself, or the one before its first dot."""
    return key if key in names else key.partition(".")[0]


def parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a parquet file, by batches of its row groups."""
    import pyarrow.parquet

    size, done = file.stat().st_size, 0
    with pyarrow.parquet.ParquetFile(file) as table:
        wanted = _present(str(file), columns, table.schema_arrow.names)
        for batch in table.iter_batches(ROWS_AT_A_TIME, columns=wanted):
            for row in _rows_of(batch):
                done += 1
                yield row, size * done // table.metadata.num_rows, None


def saved_rows(folder: Path, columns: Sequence[str], size: int) -> Iterator[Row]:
    """Rows of a dataset that ``datasets`` saved to a folder; ``size`` in bytes."""
    data = _datasets(str(folder)).load_from_disk(str(folder))
    wanted = _present(str(folder), columns, data.column_names)
    done = 0
    for table in data.select_columns(wanted).with_format("arrow").iter(ROWS_AT_A_TIME):
        for row in _rows_of(table):
            done += 1
            yield row, size * done // len(data), None


def hub_rows(address: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a dataset of the hub, NAME[:CONFIG[:SPLIT]], streamed."""
    name, _, rest = address.partition(":")
    config, _, split = rest.partition(":")
    data = _datasets(name).load_dataset(name, config or None, split=split or "train", streaming=True)
    wanted = None if data.column_names is None else _present(name, columns, data.column_names)
    for row in data:
        yield {column: row[column] for column in wanted or row}, 0, None


def csv_rows(name: str, file: Any, columns: Sequence[str], tell: Callable[[], int] | None = None) -> Iterator[Row]:
    """Rows of an open CSV file, whose first line names the columns; ``tell`` says how far a compressed one is."""
    csv.field_size_limit(sys.maxsize)  # a document is longer than the 128 KiB of the default
    offset = 0

    def lines() -> Iterator[str]:
        nonlocal offset
        for line in file:
            text = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
            offset += len(line)
            yield text.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)
    header: list[str] = []
    while True:
        at, line = offset, reader.line_num
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            swallowed = reader.line_num - line
            reason = f", with the {swallowed - 1} lines that follow it" if swallowed > 1 else ""
            yield BadRow(f"not valid CSV ({error}){reason}"), tell() if tell else offset, at
            continue
        if not header:
            header = fields
            places = {column: header.index(column) for column in _present(name, columns, header)}
        elif fields:
            yield _csv_row(fields, header, places), tell() if tell else offset, at


def _csv_row(fields: list[str], header: list[str], places: dict[str, int]) -> dict[str, Any] | BadRow:
    if len(fields) != len(header):
        return BadRow(f"{len(fields)} fields, but the header has {len(header)}")
    row = {column: fields[place] for column, place in places.items()}
    for column, text in row.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return BadRow(f"column {column}: not valid UTF-8 at character {error.start}")
    return row


def _present(source: str, keys: Sequence[str], names: Sequence[str]) -> list[str]:
    """Columns that hold the keys, of which the first, that of the text, must be there."""
    found = [top_level(key, names) for key in keys]
    if found[0] not in names:
        raise InputError(f"{source}: no column {found[0]}; it has {', '.join(names)}")
    return [name for name in dict.fromkeys(found) if name in names]


def _rows_of(batch: Any) -> Iterable[dict[str, Any] | BadRow]:
    try:
        return batch.to_pylist()
    except Exception:  # An invalid string, a date out of range: whatever one value raises condemns its row alone.
        return [_row_of(batch, number) for number in range(batch.num_rows)]


def _row_of(batch: Any, number: int) -> dict[str, Any] | BadRow:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch[name][number].as_py()
        except UnicodeDecodeError as error:
            return BadRow(f"column {name}: not valid UTF-8 at byte {error.start}")
        except Exception as error:
            return BadRow(f"column {name}: {next(iter(str(error).splitlines()), type(error).__name__)}")
    return row


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source}: needs `datasets`: pip install 'ecp-scale[data]'") from error
    return datasets
