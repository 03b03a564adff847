"""Text files to token shards, by several processes, with a result that does not depend on their number."""

import multiprocessing
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ecp_scale.data.documents import find_sources, read_documents
from ecp_scale.data.manifest import Manifest, ShardRecord, TextCounts, TokenizerRecord
from ecp_scale.data.shards import ShardWriter, Tokens, token_type, write_shard
from ecp_scale.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from ecp_scale.errors import InputError

BATCH_BYTES = 1 << 20
"""Text that travels to a worker at a time; whole documents, so one may be larger."""


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of one document, end included, and the size of its text."""

    ids: Tokens
    bytes: int
    words: int


def preprocess(
    inputs: Sequence[str],
    tokenizer_spec: str,
    output_prefix: str,
    *,
    text_key: str = "text",
    workers: int = 1,
    shard_tokens: int = 1 << 30,
    progress: bool = False,
) -> Manifest:
    """Write shards, a copy of the tokenizer and the manifest; the manifest comes last.

    Args:
        inputs: .txt and .jsonl files, or folders with them.
        tokenizer_spec: ``sentencepiece:FILE``.
        output_prefix: folder and name that every written file begins with.
        text_key: key of the text in a .jsonl line.
        workers: tokenizing processes.
        shard_tokens: tokens after which a new shard begins, at the next document.
        progress: whether to show a progress bar.

    Raises:
        InputError: if an input, the tokenizer or the output folder cannot be used.
    """
    if workers < 1 or shard_tokens < 1:
        raise InputError(f"workers is {workers} and shard_tokens {shard_tokens}, expected at least 1 each")
    sources = find_sources(inputs)
    tokenizer = load_tokenizer(tokenizer_spec)
    prefix = Path(output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)

    documents = (text for source in sources for text in read_documents(source, text_key))
    batches = _batches(documents)
    total = sum(source.stat().st_size for source in sources)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="tokenize"))
        encode = stack.enter_context(_Encoder(tokenizer_spec, workers))
        shards = _write(encode(batches), prefix, tokenizer, shard_tokens, bar.update)
    if not shards:
        raise InputError(f"the corpus is empty: no document with text in {', '.join(inputs)}")

    tokenizer_file = f"{prefix.name}.tokenizer{tokenizer.path.suffix}"
    if tokenizer.path.resolve() != (prefix.parent / tokenizer_file).resolve():
        shutil.copyfile(tokenizer.path, prefix.parent / tokenizer_file)
    record = TokenizerRecord(
        tokenizer.kind, tokenizer_file, tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_document
    )
    manifest = Manifest(record, shards, sum((shard.counts for shard in shards), TextCounts()))
    manifest.write(prefix)
    return manifest


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    batches: Iterable[list[EncodedDocument]],
    prefix: Path,
    tokenizer: SentencePieceTokenizer,
    shard_tokens: int,
    advance: Callable[[int], object],
) -> tuple[ShardRecord, ...]:
    """Write shards under provisional names, then give them names with their number."""
    dtype = token_type(tokenizer.vocab_size)
    counts: list[TextCounts] = []
    documents = (document for batch in batches for document in batch)
    pending = next(documents, None)
    while pending is not None:
        total = TextCounts()
        with write_shard(_shard_name(prefix, len(counts), None), dtype) as shard:
            while pending is not None and shard.tokens < shard_tokens:
                total += _add(shard, pending)
                advance(pending.bytes)
                pending = next(documents, None)
        counts.append(total)
    names = [_shard_name(prefix, number, len(counts)) for number in range(len(counts))]
    for number, name in enumerate(names):
        for suffix in (".bin", ".idx"):
            provisional = _shard_name(prefix, number, None)
            provisional.with_name(provisional.name + suffix).replace(name.with_name(name.name + suffix))
    return tuple(ShardRecord(name.name, total) for name, total in zip(names, counts, strict=True))


def _add(shard: ShardWriter, document: EncodedDocument) -> TextCounts:
    shard.add(document.ids)
    return TextCounts(1, len(document.ids), document.bytes, document.words)


def _shard_name(prefix: Path, number: int, count: int | None) -> Path:
    return prefix.with_name(f"{prefix.name}-{number:05d}-of-{'unfinished' if count is None else f'{count:05d}'}")


class _Encoder:
    """Encodes batches in order, in this process or in workers."""

    def __init__(self, tokenizer_spec: str, workers: int) -> None:
        self._spec = tokenizer_spec
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Encoder":
        if self._workers > 1:
            # spawn: a fork after the first encode can deadlock in a tokenizer's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, (self._spec,))
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, batches: Iterator[list[str]]) -> Iterator[list[EncodedDocument]]:
        if self._pool is None:
            _start_worker(self._spec)
            yield from map(_encode, batches)
            return
        waiting: deque[Future[list[EncodedDocument]]] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(_encode, batch))
                if len(waiting) > 2 * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise InputError("a tokenizing worker died (out of memory?); use fewer --workers") from error


_tokenizer: SentencePieceTokenizer


def _start_worker(spec: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(spec)


def _encode(texts: list[str]) -> list[EncodedDocument]:
    documents = []
    for text in texts:
        ids = [*_tokenizer.encode(text), _tokenizer.end_of_document]
        dtype = token_type(_tokenizer.vocab_size)
        documents.append(EncodedDocument(np.array(ids, dtype=dtype), len(text.encode()), len(text.split())))
    return documents
