"""Rows of tables: parquet, CSV, folders that ``datasets`` saved, and datasets of the hub."""

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ecp_scale.errors import InputError

ROWS_AT_A_TIME = 1024


class BadRow(NamedTuple):
    """A row that cannot be read, and why."""

    reason: str


Row: TypeAlias = tuple[dict[str, Any] | BadRow, int]
"""The columns of a row, and the bytes on disk read up to there."""


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
                yield row, size * done // table.metadata.num_rows


def saved_rows(folder: Path, columns: Sequence[str], size: int) -> Iterator[Row]:
    """Rows of a dataset that ``datasets`` saved to a folder; ``size`` in bytes."""
    data = _datasets(str(folder)).load_from_disk(str(folder))
    wanted = _present(str(folder), columns, data.column_names)
    done = 0
    for table in data.select_columns(wanted).with_format("arrow").iter(ROWS_AT_A_TIME):
        for row in _rows_of(table):
            done += 1
            yield row, size * done // len(data)


def hub_rows(address: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a dataset of the hub, NAME[:CONFIG[:SPLIT]], streamed."""
    name, _, rest = address.partition(":")
    config, _, split = rest.partition(":")
    data = _datasets(name).load_dataset(name, config or None, split=split or "train", streaming=True)
    wanted = None if data.column_names is None else _present(name, columns, data.column_names)
    for row in data:
        yield {column: row[column] for column in wanted or row}, 0


def csv_rows(name: str, file: Any, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of an open CSV file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # a document is longer than the 128 KiB of the default
    # Bytes that are no UTF-8 become lone surrogates, for which the parsing refuses the row.
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines)
    header = next(reader, [])
    wanted = _present(name, columns, header) if header else []
    places = {column: header.index(column) for column in wanted}
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(f"not valid CSV ({error})"), 0
            continue
        if len(fields) == len(header):
            yield {column: fields[place] for column, place in places.items()}, 0
        elif fields:
            yield BadRow(f"{len(fields)} fields, but the header has {len(header)}"), 0


def _present(source: str, keys: Sequence[str], names: Sequence[str]) -> list[str]:
    """Columns that hold the keys, of which the first, that of the text, must be there."""
    found = [top_level(key, names) for key in keys]
    if found[0] not in names:
        raise InputError(f"{source}: no column {found[0]}; it has {', '.join(names)}")
    return [name for name in dict.fromkeys(found) if name in names]


def _rows_of(batch: Any) -> Iterable[dict[str, Any] | BadRow]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_row_of(batch, number) for number in range(batch.num_rows)]


def _row_of(batch: Any, number: int) -> dict[str, Any] | BadRow:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch[name][number].as_py()
        except UnicodeDecodeError as error:
            return BadRow(f"column {name}: not valid UTF-8 at byte {error.start}")
    return row


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source}: needs `datasets`: pip install 'ecp-scale[data]'") from error
    return datasets
