"""The record of a run: metrics.jsonl, a line per optimizer step. It is evidence, not state: a resume needs none."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ecp_scale.console import say
from ecp_scale.files import finite, naming, write_text

FILE = "metrics.jsonl"


class MetricsFile:
    """Writes a record per step; on a resume the records of steps that are done again are dropped.

    Where a run starts afresh, the file of an earlier one is kept under another name.

    A file that cannot be written (a full disk) is said once, and the run goes on without it.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the record of a run that continues after ``first_step`` steps."""
        self._path = folder / FILE
        self._file: Any = None
        try:
            records, unreadable = _read(self._path)
            if unreadable:
                kept = next(path for path in self._copies("damaged") if not path.exists())
                kept.write_bytes(self._path.read_bytes())
                say(f"{self._path}: {unreadable} lines cannot be read and are left out; they are kept in {kept.name}")
            if records and first_step == 0:
                kept = next(path for path in self._copies("before") if not path.exists())
                self._path.rename(kept)
                say(f"{self._path}: {len(records)} records of an earlier run are kept in {kept.name}")
            lines = [json.dumps(record) + "\n" for record in records if record["step"] <= first_step]
            write_text(self._path, "".join(lines))
            self._file = self._path.open("a")
        except OSError as error:
            self._give_up(error)

    def _copies(self, why: str) -> Iterator[Path]:
        return (self._path.with_name(f"{FILE}.{why}-{number}") for number in itertools.count(1))

    def _give_up(self, error: OSError) -> None:
        say(f"{error.filename or self._path}: cannot be written ({error.strerror}); the run goes on without it")
        self._file = None

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The end of the file."""
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; what is no finite number is written as null."""
        if self._file is None:
            return
        try:
            with naming(self._path):
                self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
                self._file.flush()
        except OSError as error:
            self._give_up(error)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a run so far, oldest first, without lines that cannot be read; none where it has not begun."""
    return _read(folder / FILE)[0]


def unreadable_metrics(folder: Path) -> int:
    """How many lines of the record of a run cannot be read."""
    return _read(folder / FILE)[1]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records, and how many lines are none; half a line at the end, which a killed run may leave, counts as neither."""
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    records = []
    for line in lines:
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN, which earlier versions wrote
            if type(record["step"]) is type(record["tokens"]) is int and isinstance(digest_of(record), str):
                records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return records, len(lines) - len(records)


def digest_of(record: dict[str, Any]) -> Any:
    """The data digest of a record, which earlier versions called its ledger."""
    return record["data_digest"] if "data_digest" in record else record["ledger"]
