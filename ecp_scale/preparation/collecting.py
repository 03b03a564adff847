"""From encoded batches to the documents of the shards, in order, with what was left out and how far each leads."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ecp_scale.data.manifest import Skipped, SourceRecord
from ecp_scale.data.shards import Tokens
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError
from ecp_scale.preparation.encoding import EncodedBatch
from ecp_scale.preparation.journal import Journal, State
from ecp_scale.preparation.sources import Place
from ecp_scale.preparation.stream import Job, Origin
from ecp_scale.preparation.writing import NOTHING, BufferedDocument, Counts, TokenBuffer


class Snapshot(NamedTuple):
    """How far the run is behind a document: cheap, since few of them are turned into a ``State``."""

    place: Place
    digest: Any
    skipped: Skipped
    block: int
    sources: int

    def settle(self) -> State:
        """The state, with the hash of what was read of its source."""
        return State(self.place, self.digest.hexdigest(), self.skipped, self.block)


class Document(NamedTuple):
    """A document: its ids, end included, the size of its text, its output, and the state behind it.

    ``snapshot`` is None inside a record of which more documents follow.
    """

    ids: Tokens | BufferedDocument
    counts: Counts
    output: int
    snapshot: Snapshot | None


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
        self._dtype = job.encoding.dtype(tokenizer.vocab_size)
        self._buffer: TokenBuffer | None = None
        self._buffered: list[BufferedDocument] = []
        self._block_before = self._block
        self._broken: str | None = None
        self._before = [0]
        for source in job.sources:
            self._before.append(self._before[-1] + source.size)

    def documents(self, batches: Iterable[tuple[EncodedBatch, list[Origin]]]) -> Iterator[Document]:
        """All documents.

        Raises:
            InputError: at a bad record, where the job stops at errors.
        """
        for encoded, origins in batches:
            rows = encoded.counts.tolist()
            for number, (ids, counted, origin) in enumerate(zip(encoded.texts(), rows, origins, strict=True)):
                for content in origin.passed:
                    self._digest.update(content)
                    self._bytes += len(content)
                error = origin.error
                if number in encoded.errors:
                    error = f"{origin.record.name}: {encoded.errors[number]}"
                if origin.is_piece and origin.error is None:
                    yield from self._of_piece(ids, counted, origin, error)
                elif error is not None:
                    self._refuse(error)
                elif origin.record.what == "end":
                    pass
                elif number in encoded.dropped:
                    self.skipped = self.skipped.drop(encoded.dropped[number])
                elif len(ids) > self.job.shard_tokens:
                    self._refuse(self._too_long(origin, str(len(ids))))
                else:
                    self._place = origin.record.after
                    yield self._document(ids, (1, *counted), int(encoded.validation[number]))
                if origin.record.what == "end":
                    self._end_source(origin)
            last = origins[-1].record
            self.bar.n = self._before[min(last.after.source, len(self._before) - 2)] + last.read_bytes
            self.bar.set_postfix({"documents": self.written}, refresh=False)
            self.bar.update(0)

    def snapshot(self) -> Snapshot:
        """The present state."""
        return Snapshot(self._place, self._digest.copy(), self.skipped, self._block, len(self.read))

    def _document(self, ids: Tokens | BufferedDocument, counts: Counts, output: int, last: bool = True) -> Document:
        self.written += 1
        return Document(ids, counts, output, self.snapshot() if last else None)

    def _refuse(self, error: str) -> None:
        if self._buffer is not None:
            self._block = self._block_before
        self._forget()
        if self.job.on_error == "stop":
            raise InputError(error)
        self.skipped = self.skipped.refuse(error)

    def _too_long(self, origin: Origin, tokens: str) -> str:
        return (
            f"{origin.record.name}: {tokens} tokens, more than the {self.job.shard_tokens} of a shard; raise "
            "--shard-tokens or cut plain text by --text-unit"
        )

    def _forget(self) -> None:
        """Be done with a long text whose documents are taken, or will not be."""
        if self._buffer is not None:
            self._buffer.close()
        self._buffer, self._buffered, self._broken = None, [], None

    def _of_piece(self, ids: Tokens, counted: Sequence[int], origin: Origin, error: str | None) -> Iterator[Document]:
        self._broken = self._broken or error
        if self._broken is None:
            self._buffer_piece(ids, counted, origin)
        if self._broken is not None and (origin.long is not None or self.job.on_error == "stop"):
            self._refuse(self._broken)
        elif origin.long is not None:
            yield from self._of_text(origin)
            self._forget()

    def _buffer_piece(self, ids: Tokens, counted: Sequence[int], origin: Origin) -> None:
        if self._buffer is None:
            self._buffer, self._block_before = TokenBuffer(self.job.prefix.parent, self._dtype), self._block
        output = int(self._blocks and self._is_validation(self._block))
        self._block += 1
        if not self._buffered or self._buffered[-1].output != output:
            if self._buffered:
                self._end_document()
            self._buffered.append(BufferedDocument(self._buffer, output, self._buffer.tokens))
            # The space before the first word is in no document.
            counted = [counted[0], counted[1] - origin.skipped, *counted[2:]]
        document = self._buffered[-1]
        document.add(ids, (0, *counted))
        if document.counts[1] >= self.job.shard_tokens:
            self._broken = self._too_long(origin, f"at least {document.counts[1] + 1}")

    def _end_document(self) -> None:
        self._buffered[-1].add(np.array([self._tokenizer.end_of_document]), (1, 1, *NOTHING[2:]))

    def _of_text(self, origin: Origin) -> Iterator[Document]:
        """The documents of a text all of whose pieces are there: one, or one for each run of blocks of one output."""
        assert origin.long is not None
        dropped = origin.long.dropped(self.job.encoding.parsing)
        if dropped is not None:
            self._block = self._block_before  # as if it had not been there
            self.skipped = self.skipped.drop(dropped.reason)
            return
        self._end_document()
        self._place = origin.record.after
        share = self.job.encoding.validation_share
        if share and not self._blocks:
            self._buffered[0].output = int(origin.long.validation_fraction < share)
        for number, document in enumerate(self._buffered, start=1):
            yield self._document(document, document.counts, document.output, number == len(self._buffered))

    def _is_validation(self, block: int) -> bool:
        """The second block, and so on by the share: even, and at least one of any two blocks or more."""
        share = self.job.encoding.validation_share
        return block > 0 and (block == 1 or int((block - 1) * share) > int((block - 2) * share))

    def _end_source(self, origin: Origin) -> None:
        source = self.job.sources[origin.record.after.source - 1]
        hashed = self._digest.hexdigest()
        self.read.append(SourceRecord(source.name, self._bytes, hashed, origin.record.number, source.fingerprint))
        self._digest, self._bytes = hashlib.sha256(), 0
        self._place = origin.record.after
