"""From sources to batches for the workers: records in order, long texts in pieces, errors in their places."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError
from ecp_scale.preparation.cutting import Cutter, Piece
from ecp_scale.preparation.documents import LongText
from ecp_scale.preparation.encoding import Batch, Encoding, Task
from ecp_scale.preparation.journal import Identity, State
from ecp_scale.preparation.parsing import BadRecordError, Dropped
from ecp_scale.preparation.segments import Segments
from ecp_scale.preparation.sources import ChangedSourceError, Place, Record, Source

BATCH_BYTES = 1 << 18
"""Text that travels to a worker at a time; whole records, so one may be larger."""
BATCH_RECORDS = 4096
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class Job:
    """What to preprocess, and everything that decides what the shards hold."""

    sources: tuple[Source, ...]
    encoding: Encoding
    prefix: Path
    shard_tokens: int = 1 << 30
    on_error: OnError = "stop"
    part: tuple[int, int] = (1, 1)
    """Which part of a corpus this is, and of how many."""

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Prefixes of the shards: that of training first, where a share is set aside."""
        if not self.encoding.validation_share:
            return (self.prefix,)
        return tuple(self.prefix.with_name(f"{self.prefix.name}-{side}") for side in ("train", "validation"))

    def identity(self, tokenizer: Tokenizer) -> Identity:
        """The settings by which a later run knows its own work.

        ``on_error`` is not among them: shards that were finished before a stop hold what skipping would have left.
        """
        parsing = self.encoding.parsing
        settings: dict[str, Any] = {
            "tokenizer": tokenizer.sha256,
            "end_of_document": tokenizer.end_of_document,
            "text_key": parsing.text_key,
            "text_unit": parsing.text_unit,
            "where": [list(condition) for condition in parsing.where],
            "min_characters": parsing.min_characters,
            "max_characters": parsing.max_characters,
            "share": list(parsing.share),
            "preparation": parsing.preparation,
            "stdin": parsing.stdin,
            "validation_share": self.encoding.validation_share,
            "shard_tokens": self.shard_tokens,
            "part": list(self.part),
        }
        if parsing.prompt_key is not None:
            settings["prompt_key"] = parsing.prompt_key
        if parsing.chat is not None:
            settings["chat_template"] = parsing.chat.source
        return Identity(settings, tuple(source.name for source in self.sources))


class Origin(NamedTuple):
    """Where a task comes from, for the writer.

    ``record`` names it, and says where the next one begins. ``passed`` is the content that was read for it.
    ``is_piece`` says that it is a piece of a text, whose first ``skipped`` characters (a space) are not encoded;
    ``long`` is the text that it is the last piece of.
    """

    record: Record
    passed: tuple[bytes, ...]
    error: str | None = None
    is_piece: bool = False
    long: LongText | None = None
    skipped: int = 0


def batches(job: Job, start: State, digest: Any, cutter: Cutter, blocks: bool) -> Iterator[tuple[Batch, list[Origin]]]:
    """Tasks for the workers with their origins, in order, each read when it is wanted.

    Args:
        job: what to read.
        start: where to begin; what was read of that source is hashed into ``digest``.
        digest: of the source where the run begins.
        cutter: for long texts, or for all of them where ``blocks``.
        blocks: whether every text is cut into blocks.
    """
    batch: Batch = []
    origins: list[Origin] = []
    size = 0
    for task, origin in _tasks(job, start, digest, cutter, blocks):
        batch.append(task)
        origins.append(origin)
        raw = task.raw.text if isinstance(task.raw, Piece) else task.raw
        size += _size(raw) if isinstance(raw, dict) else len(raw)
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch, origins
            batch, origins, size = [], [], 0
    if batch:
        yield batch, origins


def _size(value: object) -> int:
    if isinstance(value, list | dict):  # the turns of a conversation
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 8


def _tasks(job: Job, start: State, digest: Any, cutter: Cutter, blocks: bool) -> Iterator[tuple[Task, Origin]]:
    records = _records(job, start, digest)
    for record, error, is_json in records:
        if error is None and record.what != "end" and (record.part or blocks):
            yield from _Pieces(job, record, is_json, records).cut(cutter)
        else:
            yield Task(record.raw, is_json and record.what != "end"), Origin(record, (record.passed,), error)


RecordOrError = tuple[Record, str | None, bool]
"""A record, why there is none, and whether it is a line of JSON."""


def _records(job: Job, start: State, digest: Any) -> Iterator[RecordOrError]:
    """Records of all sources; in the place of what cannot be read, its error, which ends the source."""
    reading = job.encoding.parsing.reading
    for number in range(start.place.source, len(job.sources)):
        source = job.sources[number]
        is_json = source.format(reading) == "json"
        is_first = number == start.place.source
        first, seen = (start.place, start.seen) if is_first else (Place(number), None)
        count = first.record
        try:
            for record in source.records(number, first, reading, digest if is_first else None, seen):
                count = max(count, record.after.record)
                yield record, None, is_json
        except ChangedSourceError:
            raise
        except InputError as error:
            # In its place in the order, so that what comes before it is still written. A run that skips it goes on with
            # the next source.
            yield Record(b"", source.name, "end", count, None, Place(number + 1), b"", source.size), str(error), False
            if job.on_error == "stop":
                return


class _Pieces:
    """The pieces of one text: of a record, or of as many as a long one comes in."""

    def __init__(self, job: Job, first: Record, is_json: bool, records: Iterator[RecordOrError]) -> None:
        self._parsing = job.encoding.parsing
        self._record = first
        self._is_json = is_json
        self._records = records
        self._passed: list[bytes] = []
        self._broken: Origin | None = None
        self._long = LongText()

    def cut(self, cutter: Cutter) -> Iterator[tuple[Task, Origin]]:
        """Every piece, and behind a text that cannot be read its error."""
        begin = self._record
        try:
            for piece in cutter.pieces(self._parts()):
                yield (
                    Task(piece),
                    self._origin(is_piece=True, long=self._long if piece.last else None, skipped=piece.skipped),
                )
        except BadRecordError as error:
            reason = f"{begin.name}: {error}"
            while not self._record.last:
                self._next()
            if self._broken is None:
                yield Task(b""), self._origin(error=reason)
            else:
                yield Task(b""), self._broken._replace(passed=tuple(self._passed))

    def _origin(self, **what: Any) -> Origin:
        passed, self._passed = tuple(self._passed), []
        return Origin(self._record, passed, **what)

    def _parts(self) -> Iterator[str]:
        self._passed.append(self._record.passed)
        if not self._record.part:
            yield self._whole()
            return
        while True:
            assert isinstance(self._record.raw, bytes)
            yield self._long.decode(self._record.raw, self._record.last)
            if self._record.last:
                return
            self._next()
            if self._broken is not None:
                raise BadRecordError("the file ends in the middle of it")

    def _next(self) -> None:
        record, error, _ = next(self._records)
        if error is not None:
            self._broken = Origin(record, (), error)
            self._record = self._record._replace(last=True)
        else:
            self._record = record
            self._passed.append(record.passed)

    def _whole(self) -> str:
        text = self._parsing.text(self._record.raw, self._is_json)
        assert not isinstance(text, Segments), "texts with marks are not cut"
        if isinstance(text, Dropped):
            self._long.drop(text)
            return ""
        self._long.decode(text.encode(), True)
        return text
