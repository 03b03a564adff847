"""The shards that a run is writing, one per output, and the journal that knows what of them is on disk."""

from collections.abc import Sequence
from pathlib import Path

from ecp_scale.data.manifest import ShardRecord, SourceRecord, TextCounts
from ecp_scale.data.shards import Tokens
from ecp_scale.preparation.journal import Journal, State
from ecp_scale.preparation.stream import Job
from ecp_scale.preparation.writing import BufferedDocument, Counts, ShardWriter, publish


class Outputs:
    """Appends documents to the outputs; ``commit`` makes what was appended part of the run."""

    def __init__(self, job: Job, vocab_size: int, journal: Journal) -> None:
        """Go on with the shards that the journal knows to be begun."""
        self.journal = journal
        self._job = job
        self._dtype = job.encoding.dtype(vocab_size)
        self.finished: list[list[ShardRecord]] = [[] for _ in job.outputs]
        self._open: list[ShardWriter | None] = [
            self._next(number, begun) if begun.documents else None for number, begun in enumerate(journal.begun)
        ]

    def _next(self, output: int, begun: TextCounts | None = None) -> ShardWriter:
        number = len(self.journal.shards[output]) + len(self.finished[output])
        return ShardWriter(shard_name(self._job.outputs[output], number, None), self._dtype, begun or TextCounts())

    def make_room(self, output: int, tokens: int) -> bool:
        """Finish the open shard if so many tokens do not fit; whether there are shards to commit."""
        writer = self._open[output]
        if writer is not None and writer.tokens + tokens > self._job.shard_tokens:
            self._finish(output)
        return any(self.finished)

    def add(self, output: int, ids: Tokens | BufferedDocument, counts: Counts) -> None:
        """Append a document."""
        writer = self._open[output]
        if writer is None:
            writer = self._open[output] = self._next(output)
        writer.add(ids, counts)

    def finish(self) -> None:
        """Finish all open shards."""
        for output in range(len(self._open)):
            self._finish(output)

    def _finish(self, output: int) -> None:
        writer = self._open[output]
        if writer is not None:
            self.finished[output].append(writer.finish())
            self._open[output] = None

    def commit(self, state: State, read: Sequence[SourceRecord], complete: bool = False) -> None:
        """Write to the journal what was appended; ``state`` is the one behind it, ``read`` all sources before that."""
        begun = []
        for writer in self._open:
            if writer is not None:
                writer.sync()
            begun.append(TextCounts() if writer is None else writer.counts)
        self.journal = self.journal.append(self.finished, begun, read[len(self.journal.read) :], state, complete)
        for prefix, records in zip(self._job.outputs, self.finished, strict=True):
            for record in records:
                publish(prefix.with_name(record.name))
        self.finished = [[] for _ in self._open]

    @property
    def used(self) -> list[bool]:
        """Per output whether it has a document."""
        parts = zip(self.journal.shards, self.finished, self._open, strict=True)
        return [bool(shards or finished or writer) for shards, finished, writer in parts]

    def close(self) -> None:
        """Close what is open. Files stay, but for the journal of a run that has done nothing."""
        for writer in self._open:
            if writer is not None:
                writer.close()
        if not any(self.journal.shards) and not any(begun.documents for begun in self.journal.begun):
            self.journal.path.unlink(missing_ok=True)


def shard_name(prefix: Path, number: int, count: int | None) -> Path:
    """PREFIX-00003-of-00012, or PREFIX-00003-of-unfinished while the count is not known."""
    return prefix.with_name(f"{prefix.name}-{number:05d}-of-{'unfinished' if count is None else f'{count:05d}'}")
