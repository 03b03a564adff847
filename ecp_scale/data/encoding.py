"""Records to token ids, in order, in this process or in workers."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ecp_scale.data.parsing import BadRecordError, Parsing
from ecp_scale.data.shards import Tokens, token_type
from ecp_scale.data.sources import Raw
from ecp_scale.data.tokenizer import Tokenizer, load_tokenizer
from ecp_scale.errors import InputError


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of a batch of records: token ids one after another, and per record what became of it.

    ``tokens`` (records,) counts the ids of each record's document with its end, 0 where there is no document; ``bytes``
    and ``words`` (records,) measure its text; ``errors`` says by record number why one is bad.
    """

    ids: Tokens
    tokens: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    errors: dict[int, str] = field(default_factory=dict)

    def documents(self) -> list[Tokens]:
        """Ids of each record's document, empty where there is none."""
        return np.split(self.ids, np.cumsum(self.tokens)[:-1])


class Encoder:
    """Encodes batches of raw records, with whether they are JSON, in order."""

    def __init__(self, tokenizer_spec: str, parsing: Parsing, workers: int) -> None:
        self._arguments = (tokenizer_spec, parsing)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoder":
        if self._workers > 1:
            # spawn: a fork after the first encode can deadlock in a tokenizer's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start, self._arguments)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, batches: Iterable[tuple["Batch", object]]) -> Iterator[tuple[EncodedBatch, object]]:
        """Encode each batch; what comes with it is handed on."""
        if self._pool is None:
            _start(*self._arguments)
            yield from ((_encode(batch), rest) for batch, rest in batches)
            return
        waiting: deque[tuple[Future[EncodedBatch], object]] = deque()
        try:
            for batch, rest in batches:
                waiting.append((self._pool.submit(_encode, batch), rest))
                if len(waiting) > 2 * self._workers:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except BrokenProcessPool as error:
            raise InputError("a tokenizing worker died (out of memory?); use fewer --workers") from error


Batch = list[tuple[Raw, bool]]
"""Raw records, and whether each is a line of JSON."""


def _result(waiting: tuple[Future[EncodedBatch], object]) -> tuple[EncodedBatch, object]:
    future, rest = waiting
    return future.result(), rest


_tokenizer: Tokenizer
_parsing: Parsing


def _start(tokenizer_spec: str, parsing: Parsing) -> None:
    global _tokenizer, _parsing
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker is one thread
    _tokenizer, _parsing = load_tokenizer(tokenizer_spec), parsing


def _encode(batch: Batch) -> EncodedBatch:
    count = len(batch)
    tokens, sizes, words = (np.zeros(count, dtype=np.int64) for _ in range(3))
    texts: list[str] = []
    numbers: list[int] = []
    errors: dict[int, str] = {}
    for number, (raw, is_json) in enumerate(batch):
        try:
            text = _parsing.text(raw, is_json)
        except BadRecordError as error:
            errors[number] = str(error)
            continue
        if text is not None:
            texts.append(text)
            numbers.append(number)
    encoded = _tokenizer.encode_batch(texts)
    for number, text, ids in zip(numbers, texts, encoded, strict=True):
        tokens[number] = len(ids) + 1
        sizes[number], words[number] = measure(text)
    end = np.array([_tokenizer.end_of_document], dtype=np.int32)
    parts = [part for ids in encoded for part in (ids, end)]
    # Casting: every id is below vocab_size, by which the type was chosen.
    dtype = token_type(_tokenizer.vocab_size)
    ids = np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)
    return EncodedBatch(ids, tokens, sizes, words, errors)


_BLANKS = "".join(character for character in map(chr, range(0x10000)) if character.isspace())
_BLANK_OR_NOT = bytes.maketrans(bytes(range(256)), bytes(32 if chr(i) in _BLANKS[:10] else 120 for i in range(256)))


def measure(text: str) -> tuple[int, int]:
    """Bytes of a text in UTF-8, and its words: what ``len(text.split())`` counts, in a third of the time."""
    content = text.encode()
    if not text.isascii() and any(blank in text for blank in _BLANKS[10:]):
        return len(content), len(text.split())
    marked = content.translate(_BLANK_OR_NOT)
    return len(content), marked.count(b" x") + marked.startswith(b"x")
