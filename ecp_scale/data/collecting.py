"""From encoded batches to the documents of the shards, in order, with what was left out and how far each leads."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ecp_scale.data.encoding import Counted, EncodedBatch
from ecp_scale.data.journal import Journal, State
from ecp_scale.data.manifest import SourceRecord, TextCounts
from ecp_scale.data.shards import Tokens, token_type
from ecp_scale.data.stream import Job, Known
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.data.writing import Document, Spool
from ecp_scale.errors import InputError


@dataclass(frozen=True)
class Collected:
    """A document, the number of the output that it belongs to, and the state behind it.

    ``reached`` gives that state; it is None inside a record of which more documents follow.
    """

    document: Document
    output: int
    reached: "Reached | None"


@dataclass(frozen=True)
class Reached:
    """A state as it is kept for each document: cheap, since few of them are asked for their hash."""

    state: State
    digest: Any
    sources: int

    def settle(self) -> State:
        """The state, with the hash of what was read of its source."""
        return State(self.state.place, self.digest.hexdigest(), self.state.skipped, self.state.block)


class Collector:
    """Makes documents of encoded items, and keeps count."""

    def __init__(
        self, job: Job, tokenizer: Tokenizer, journal: Journal, digest: Any, blocks: bool, bar: "tqdm[Any]"
    ) -> None:
        self.job = job
        self.bar = bar
        self.read = list(journal.read)
        self.skipped = journal.state.skipped
        self.written = 0
        self._blocks = blocks
        self._digest = digest
        self._bytes = journal.state.place.offset
        self._place = journal.state.place
        self._block = journal.state.block
        self._tokenizer = tokenizer
        self._dtype = token_type(tokenizer.vocab_size)
        self._spools: list[tuple[int, Spool]] = []
        self._broken: str | None = None
        self._before = [0]
        for source in job.sources:
            self._before.append(self._before[-1] + source.size)

    def documents(self, batches: Iterable[tuple[EncodedBatch, list[Known]]]) -> Iterator[Collected]:
        """All documents.

        Raises:
            InputError: at a bad record, where the job stops at errors.
        """
        for encoded, known in batches:
            for number, ids in enumerate(encoded.texts()):
                yield from self._of_item(encoded, number, ids, known[number])
            last = known[-1].record
            self.bar.n = self._before[min(last.after.source, len(self._before) - 2)] + last.read_bytes
            self.bar.set_postfix({"documents": self.written}, refresh=False)
            self.bar.update(0)

    def reached(self) -> Reached:
        """The present state."""
        return Reached(State(self._place, None, self.skipped, self._block), self._digest.copy(), len(self.read))

    def _of_item(self, encoded: EncodedBatch, number: int, ids: Tokens, mark: Known) -> Iterator[Collected]:
        for content in mark.passed:
            self._digest.update(content)
            self._bytes += len(content)
        reason = encoded.errors.get(number)
        error = mark.error or (f"{mark.record.name}: {reason}" if reason else None)
        if mark.is_piece and mark.error is None:
            self._block = mark.block + 1
            yield from self._of_piece(ids, encoded.counts[number], mark, error)
        elif error is not None:
            self._refuse(error)
        elif mark.record.what != "end":
            if number in encoded.dropped:
                self.skipped = self.skipped.drop(encoded.dropped[number])
            elif len(ids) > self.job.shard_tokens:
                self._refuse(self._too_long(mark, len(ids)))
            else:
                self._place = mark.record.after
                counts = _counts(1, encoded.counts[number])
                yield self._collected(Document(ids, counts), bool(encoded.validation[number]))
        if mark.record.what == "end":
            self._end_source(mark)

    def _collected(self, document: Document, validation: bool, last: bool = True) -> Collected:
        self.written += 1
        return Collected(document, int(validation), self.reached() if last else None)

    def _refuse(self, error: str) -> None:
        self._forget()
        if self.job.on_error == "stop":
            raise InputError(error)
        self.skipped = self.skipped.refuse(error)

    def _too_long(self, mark: Known, tokens: int) -> str:
        return (
            f"{mark.record.name}: {tokens} tokens, more than the {self.job.shard_tokens} of a shard; raise "
            "--shard-tokens or cut plain text by --text-unit"
        )

    def _forget(self) -> None:
        for _, spool in self._spools:
            spool.close()
        self._spools, self._broken = [], None

    def _of_piece(self, ids: Tokens, counted: Any, mark: Known, error: str | None) -> Iterator[Collected]:
        if error is not None and self._broken is None:
            self._broken = error
        if self._broken is None:
            side = int(self._blocks and self._is_validation(mark.block))
            if not self._spools or self._spools[-1][0] != side:
                self._spools.append((side, Spool(self.job.prefix.parent, self._dtype)))
                # The space before the first word is in no document.
                counted = counted - np.array([0, mark.skipped, 0, 0, 0])
            self._spools[-1][1].add(ids, _counts(0, counted))
            if self._spools[-1][1].counts.tokens >= self.job.shard_tokens:
                self._broken = self._too_long(mark, self._spools[-1][1].counts.tokens + 1)
        if self._broken is not None and (mark.long is not None or self.job.on_error == "stop"):
            self._refuse(self._broken)
        elif mark.long is not None:
            yield from self._of_text(mark)

    def _of_text(self, mark: Known) -> Iterator[Collected]:
        """The documents of a text all of whose pieces are there: one, or one for each run of blocks of one output."""
        assert mark.long is not None
        dropped = mark.long.dropped(self.job.encoding.parsing)
        if dropped is not None:
            self._forget()
            self.skipped = self.skipped.drop(dropped.reason)
            return
        spools, self._spools = self._spools, []
        self._place = mark.record.after
        end = np.array([self._tokenizer.end_of_document])
        for number, (side, spool) in enumerate(spools):
            spool.add(end, TextCounts(1, 1))
            share = self.job.encoding.validation_share
            validation = bool(side) if self._blocks else bool(share) and mark.long.fraction < share
            yield self._collected(Document(spool, spool.counts), validation, number == len(spools) - 1)

    def _is_validation(self, block: int) -> bool:
        """The second block, and so on by the share: even, and at least one of any two blocks or more."""
        share = self.job.encoding.validation_share
        return block > 0 and (block == 1 or int((block - 1) * share) > int((block - 2) * share))

    def _end_source(self, mark: Known) -> None:
        source = self.job.sources[mark.record.after.source - 1]
        hashed = self._digest.hexdigest()
        self.read.append(SourceRecord(source.name, self._bytes, hashed, mark.record.number, source.fingerprint))
        self._digest, self._bytes = hashlib.sha256(), 0
        self._place = mark.record.after


def _counts(documents: int, counted: Any) -> TextCounts:
    return TextCounts(documents, *Counted._make(counted.tolist()))
