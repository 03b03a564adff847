"""The documents of a preprocessing job in order: records to workers, token ids back, and what was left out between."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from ecp_scale.data.encoding import Batch, EncodedBatch
from ecp_scale.data.journal import Journal
from ecp_scale.data.manifest import Skipped, TextCounts
from ecp_scale.data.parsing import Parsing
from ecp_scale.data.shards import Tokens
from ecp_scale.data.sources import Place, Record, Source
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError

BATCH_BYTES = 1 << 20
"""Text that travels to a worker at a time; whole records, so one may be larger."""
BATCH_RECORDS = 4096
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class Job:
    """What to preprocess, and everything that decides what the shards hold."""

    sources: tuple[Source, ...]
    tokenizer_spec: str
    prefix: Path
    parsing: Parsing = field(default_factory=Parsing)
    shard_tokens: int = 1 << 30
    on_error: OnError = "stop"

    def identity(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The settings by which a later run knows its own work, as JSON holds them.

        ``on_error`` is not among them: shards that were finished before a stop hold what skipping would have left.
        """
        settings = {
            "tokenizer": tokenizer.sha256,
            "sources": [[source.name, source.size] for source in self.sources],
            "parsing": dataclasses.asdict(self.parsing),
            "shard_tokens": self.shard_tokens,
        }
        return json.loads(json.dumps(settings))


class Known(NamedTuple):
    """What the writer must know of a record: what to call it, the place after it, how far it was, why it is bad."""

    name: str
    after: Place
    read_bytes: int
    error: str | None


def batches(job: Job, start: Place) -> Iterator[tuple[Batch, list["Known"]]]:
    """Raw records for the workers, with what the writer must know of them."""
    batch: Batch = []
    known: list[Known] = []
    size = 0
    for record, error, is_json in _records(job, start):
        batch.append((record.raw, is_json))
        known.append(Known(record.name, record.after, record.read_bytes, error))
        size += len(record.raw) if isinstance(record.raw, bytes) else sum(map(_size, record.raw.values()))
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch, known
            batch, known, size = [], [], 0
    if batch:
        yield batch, known


def _size(value: object) -> int:
    return len(value) if isinstance(value, str) else 8


def _records(job: Job, start: Place) -> Iterator[tuple[Record, str | None, bool]]:
    """Records of all sources from ``start`` on; in the place of what cannot be read, its error."""
    for number in range(start.source, len(job.sources)):
        source = job.sources[number]
        first = start if number == start.source else Place(number)
        try:
            for record in source.records(number, first, job.parsing.reading):
                yield record, None, source.is_json
        except InputError as error:
            # In its place in the order, so that what comes before it is still written. A run that skips it goes on with
            # the next source.
            yield Record(b"", source.name, Place(number + 1), source.size), str(error), False
            if job.on_error == "stop":
                return


class Documents:
    """The documents of a run, one at a time, and what was left out before each."""

    def __init__(
        self, job: Job, batches: Iterable[tuple[EncodedBatch, Any]], journal: Journal, bar: "tqdm[Any]"
    ) -> None:
        self.job = job
        self.bar = bar
        self.skipped = journal.skipped
        self.before = [0]
        for source in job.sources:
            self.before.append(self.before[-1] + source.size)
        self.documents_done = journal.totals().documents
        self.done_with: tuple[Place, Skipped] = (journal.place, journal.skipped)
        self._stream = self._all(batches)
        self._counts = TextCounts()
        self._place = journal.place
        self.pending: Tokens | None = None
        self._advance()

    def take(self) -> TextCounts:
        """Count the pending document as written and go on to the next."""
        counts = self._counts
        self.documents_done += 1
        # What is left out between this document and the next is counted with the next.
        self.done_with = (self._place, self.skipped)
        self._advance()
        return counts

    def _advance(self) -> None:
        self.pending = next(self._stream, None)

    def _all(self, batches: Iterable[tuple[EncodedBatch, Any]]) -> Iterator[Tokens]:
        for encoded, known in batches:
            for number, ids in enumerate(encoded.documents()):
                record = known[number]
                error = record.error
                reason = encoded.errors.get(number)
                if reason is not None:
                    error = f"{record.name}: {reason}"
                elif len(ids) > self.job.shard_tokens:
                    error = f"{record.name}: {len(ids)} tokens, more than the {self.job.shard_tokens} of a shard"
                if error is not None:
                    if self.job.on_error == "stop":
                        raise InputError(error)
                    self.skipped = self.skipped.refuse(error)
                elif not len(ids):
                    self.skipped = self.skipped.drop()
                else:
                    counts = (int(values[number]) for values in (encoded.tokens, encoded.bytes, encoded.words))
                    self._counts, self._place = TextCounts(1, *counts), record.after
                    yield ids
            last = known[-1]
            self.bar.n = self.before[min(last.after.source, len(self.before) - 2)] + last.read_bytes
            self.bar.set_postfix({"documents": self.documents_done}, refresh=False)
            self.bar.update(0)
