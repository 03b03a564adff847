"""Records to token ids, in order, in this process or in workers."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ecp_scale.data.marks import MARKED, marked, plain
from ecp_scale.data.shards import Tokens, token_type
from ecp_scale.data.tokenizer import Ids, Tokenizer, load_tokenizer
from ecp_scale.errors import InputError
from ecp_scale.preparation.cutting import FAST_CHARACTERS, PIECE_CHARACTERS, Cutter, Piece
from ecp_scale.preparation.interrupts import Interrupts
from ecp_scale.preparation.measuring import measure
from ecp_scale.preparation.parsing import VALIDATION, BadRecordError, Dropped, Parsing, hash_fraction
from ecp_scale.preparation.segments import Segments
from ecp_scale.preparation.sources import Raw

Counts = npt.NDArray[np.int64]
Rest = TypeVar("Rest")


class Task(NamedTuple):
    """What is encoded: a raw record and whether it is a line of JSON, or a piece of a text."""

    raw: Raw | Piece
    is_json: bool = False


Batch = list[Task]


class Counted(NamedTuple):
    """Size of a text, and what became of it: its UTF-8 bytes, words, line ends, tokens and unknown tokens."""

    tokens: int
    bytes: int
    words: int
    lines: int
    unknown: int


NO_TEXT = Counted(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class EncodedBatch:
    """Texts of a batch of items: token ids one after another, and per item what became of it.

    ``counts`` (items, 5) has the fields of ``Counted``, zeros where there is no text; the ids of a record end with the
    end of its document, those of a piece do not. ``validation`` (items,) says whether a record's hash lies below the
    share that is set aside. ``errors`` and ``dropped`` say by item why there is no text.
    """

    ids: Tokens
    counts: Counts
    validation: npt.NDArray[np.bool_]
    errors: dict[int, str] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)

    def texts(self) -> list[Tokens]:
        """Ids of each item, empty where there is no text."""
        return np.split(self.ids, np.cumsum(self.counts[:, 0])[:-1])


@dataclass(frozen=True)
class Encoding:
    """How texts are made of records and ids of texts. It travels to the worker processes."""

    tokenizer_spec: str
    end_token: str | None = None
    parsing: Parsing = field(default_factory=Parsing)
    validation_share: float = 0.0
    """Share of the documents, by their hash, that is set aside."""

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return load_tokenizer(self.tokenizer_spec, self.end_token)

    @property
    def control(self) -> bool:
        """Whether names of control tokens in a prepared text become the tokens."""
        return self.parsing.preparation != "none"

    def dtype(self, vocab_size: int) -> type[np.generic]:
        """Type of the stored ids."""
        return MARKED if self.parsing.marks else token_type(vocab_size)


class Encoder:
    """Encodes batches in order."""

    def __init__(self, encoding: Encoding, workers: int, interrupts: Interrupts) -> None:
        self._encoding = encoding
        self._workers = workers
        self._interrupts = interrupts
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoder":
        if self._workers > 1:
            # spawn: a fork after the first encode can deadlock in a tokenizer's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, (self._encoding,))
            # Trap: its start lifts every signal mask.
            resource_tracker.ensure_running()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ProcessPoolExecutor, batch: Batch) -> "Future[EncodedBatch]":
        # A task may start a worker, which inherits the mask: Ctrl-C, which a terminal sends to all, is for this process
        # to answer.
        with self._interrupts.held:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return pool.submit(_encode, batch)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __call__(self, batches: Iterable[tuple[Batch, Rest]]) -> Iterator[tuple[EncodedBatch, Rest]]:
        """Encode each batch; what comes with it is handed on."""
        if self._pool is None:
            _start(self._encoding)
            yield from ((_encode(batch), rest) for batch, rest in batches)
            return
        waiting: deque[tuple[Future[EncodedBatch], Rest]] = deque()
        try:
            for batch, rest in batches:
                waiting.append((self._submit(self._pool, batch), rest))
                if len(waiting) > 2 * self._workers:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except BrokenProcessPool as error:
            raise InputError("a tokenizing worker died (out of memory?); use fewer --workers") from error


def _result(waiting: tuple[Future[EncodedBatch], Rest]) -> tuple[EncodedBatch, Rest]:
    future, rest = waiting
    return future.result(), rest


_tokenizer: Tokenizer
_encoding: Encoding
_cutter: Cutter


def _start_worker(encoding: Encoding) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _start(encoding)


def _die_with(parent: int) -> None:
    # Trap: a worker waits for its next task for ever, whether or not anybody is left to give one.
    wait([parent])
    os._exit(1)


def _start(encoding: Encoding) -> None:
    global _tokenizer, _encoding, _cutter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker is one thread
    _tokenizer, _encoding = encoding.load_tokenizer(), encoding
    _cutter = Cutter(_tokenizer, encoding.control, FAST_CHARACTERS if _tokenizer.is_local else PIECE_CHARACTERS)


def _encode(batch: Batch) -> EncodedBatch:
    counts = [NO_TEXT] * len(batch)
    validation = np.zeros(len(batch), dtype=np.bool_)
    pieces: dict[int, Piece] = {}
    errors: dict[int, str] = {}
    dropped: dict[int, str] = {}
    for number, (raw, is_json) in enumerate(batch):
        if isinstance(raw, Piece):
            pieces[number] = raw
            continue
        try:
            found = _encoding.parsing.text(raw, is_json)
        except BadRecordError as error:
            errors[number] = str(error)
            continue
        if isinstance(found, Dropped):
            dropped[number] = found.reason
        else:
            segments = found if isinstance(found, Segments) else None
            text = found.text if isinstance(found, Segments) else found
            pieces[number] = Piece(text, segments=segments)
            if _encoding.validation_share:
                validation[number] = hash_fraction(text, VALIDATION) < _encoding.validation_share
    encoded = _ids(pieces, errors)
    end = np.array([_tokenizer.end_of_document], dtype=np.int32)
    parts: list[Ids] = []
    for number, ids in encoded.items():
        text = pieces[number].text
        segments = pieces[number].segments
        # Whoever says the last word ends the document.
        ended = () if isinstance(batch[number].raw, Piece) else (end if is_trained(segments) else marked(end),)
        parts += (ids, *ended)
        counts[number] = Counted(len(ids) + len(ended), *measure(text), _unknown(pieces[number], ids))
    # Casting: every id is below vocab_size, by which the type was chosen.
    dtype = _encoding.dtype(_tokenizer.vocab_size)
    ids = np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)
    return EncodedBatch(ids, np.array(counts, dtype=np.int64), validation, errors, dropped)


def _ids(pieces: dict[int, Piece], errors: dict[int, str]) -> dict[int, Ids]:
    """Ids by item; where the tokenizer takes offence at one, the others are encoded all the same."""
    try:
        return _joined(pieces)
    except Exception:
        found: dict[int, Ids] = {}
    for number, piece in pieces.items():
        try:
            found |= _joined({number: piece})
        except Exception as error:  # Whatever a library raises: no content of a record ends the run.
            reason = next(iter(str(error).splitlines()), "")
            errors[number] = f"the tokenizer cannot encode it: {reason or type(error).__name__}"
    return found


def _joined(pieces: dict[int, Piece]) -> dict[int, Ids]:
    """Ids by item, those of its pieces one after another; the tokenizer takes ``PIECE_CHARACTERS`` at a time."""
    parts: dict[int, list[Ids]] = {number: [] for number in pieces}
    waiting: list[tuple[int, str]] = []
    size = 0

    def encode() -> None:
        encoded = _tokenizer.encode_batch([text for _, text in waiting], _encoding.control)
        for (number, _), ids in zip(waiting, encoded, strict=True):
            parts[number].append(ids)
        waiting.clear()

    for number, whole in pieces.items():
        if whole.segments is not None:
            parts[number] += _of_segments(whole.segments)
            continue
        for piece in _cutter.pieces([whole.encoded]):
            waiting.append((number, _encoding.parsing.prepared(piece.encoded, piece.last and whole.last)))
            size += len(piece.text)
            if size >= PIECE_CHARACTERS:
                encode()
                size = 0
    if waiting:
        encode()
    return {number: ids[0] if len(ids) == 1 else np.concatenate(ids) for number, ids in parts.items()}


def _of_segments(segments: Segments) -> list[Ids]:
    """Ids of each part, marked where it has no loss."""
    encoded = _tokenizer.encode_batch([text for text, _ in segments.parts], segments.control)
    return [ids if trained else marked(ids) for ids, (_, trained) in zip(encoded, segments.parts, strict=True)]


def is_trained(segments: Segments | None) -> bool:
    """Whether the end of a document has a loss: that of the last part has."""
    return segments is None or segments.parts[-1][1]


def _unknown(piece: Piece, ids: Ids) -> int:
    """Tokens that stand for what the vocabulary cannot write; an <unk> of the text itself is none."""
    if _tokenizer.unknown is None:
        return 0
    written = piece.text.count("<unk>") if _encoding.control else 0
    return max(0, int(np.count_nonzero(plain(ids) == _tokenizer.unknown)) - written)
