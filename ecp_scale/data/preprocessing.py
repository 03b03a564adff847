"""Text to token shards: any number of processes, killed at any moment, one and the same result.

One process reads records in order and writes documents in order; workers do the rest. A shard ends where the next
document would make it too long, so shards are a function of the input alone. After each shard the journal says where
the next one begins; a run that finds a journal of its own goes on from there.
"""

import dataclasses
import errno
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from ecp_scale.data.encoding import Encoder
from ecp_scale.data.files import sha256_of
from ecp_scale.data.journal import Journal, check_same_run, journal_path
from ecp_scale.data.manifest import (
    Manifest,
    ShardRecord,
    SourceRecord,
    TextCounts,
    TokenizerRecord,
    manifest_path,
)
from ecp_scale.data.parsing import Parsing
from ecp_scale.data.shards import token_type, write_shard
from ecp_scale.data.sources import Source, find_sources
from ecp_scale.data.stream import Documents, Job, OnError, batches
from ecp_scale.data.tokenizer import Tokenizer, load_tokenizer
from ecp_scale.errors import InputError


def preprocess(
    inputs: Sequence[str],
    tokenizer_spec: str,
    output_prefix: str,
    *,
    parsing: Parsing | None = None,
    workers: int = 1,
    shard_tokens: int = 1 << 30,
    on_error: OnError = "stop",
    part: tuple[int, int] = (1, 1),
    progress: bool = False,
) -> Manifest:
    """Write shards, a copy of the tokenizer and the manifest; the manifest comes last.

    Args:
        inputs: files, folders and hub datasets, see ``ecp_scale.data.sources``.
        tokenizer_spec: see ``ecp_scale.data.tokenizer.load_tokenizer``.
        output_prefix: folder and name that every written file begins with.
        parsing: text column, filters and preparation.
        workers: tokenizing processes.
        shard_tokens: most tokens of a shard.
        on_error: what to do with a bad record or file: stop, keeping the shards finished so far, or skip it, counting.
        part: which share of the sources to do, from 1, and of how many.
        progress: whether to show a progress bar.

    Raises:
        InputError: if an input, the tokenizer or the output folder cannot be used.
    """
    if workers < 1 or shard_tokens < 2:
        raise InputError(f"workers is {workers} and shard_tokens {shard_tokens}, expected at least 1 and 2")
    tokenizer = load_tokenizer(tokenizer_spec)
    sources = share_of(find_sources(inputs), *part)
    prefix = Path(output_prefix)
    job = Job(tuple(sources), tokenizer_spec, prefix, parsing or Parsing(), shard_tokens, on_error)
    identity = job.identity(tokenizer)
    if manifest_path(prefix).exists():
        manifest = Manifest.read(prefix)
        check_same_run(manifest_path(prefix), manifest.settings, identity)
        journal_path(prefix).unlink(missing_ok=True)
        return manifest
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal.read(prefix, identity)
        if not journal.complete:
            journal = _write_shards(job, tokenizer, journal, workers, progress)
        return _finish(job, tokenizer, journal)
    except OSError as error:
        full = "; finished shards stay: make room and run the same command again"
        raise InputError(
            f"{error.filename or prefix}: {error.strerror}{full if error.errno == errno.ENOSPC else ''}"
        ) from error


def share_of(sources: Sequence[Source], part: int, parts: int) -> list[Source]:
    """A run of consecutive sources, about the ``parts``-th of all bytes.

    Raises:
        InputError: if there are not as many sources as parts.
    """
    if not 1 <= part <= parts:
        raise InputError(f"--part is {part} of {parts}, expected a number from 1 to {parts}")
    if parts > len(sources):
        raise InputError(f"--parts is {parts}, but there are {len(sources)} sources to share")
    total = sum(source.size for source in sources) + len(sources)
    shares: list[list[Source]] = [[] for _ in range(parts)]
    before = 0
    for number, source in enumerate(sources):
        # The middle of a source decides; every part gets at least one, and the order stays.
        wanted = (before + source.size // 2) * parts // total
        empty = next((index for index, share in enumerate(shares) if not share), parts - 1)
        left = len(sources) - number
        lowest = empty - 1 if empty and left > parts - empty else empty
        shares[min(max(wanted, lowest), empty)].append(source)
        before += source.size + 1
    return shares[part - 1]


def _write_shards(job: Job, tokenizer: Tokenizer, journal: Journal, workers: int, progress: bool) -> Journal:
    """Write the shards that the journal lacks, and the journal after each."""
    total = sum(source.size for source in job.sources)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="tokenize", smoothing=0.05)
        )
        encoder = stack.enter_context(Encoder(job.tokenizer_spec, job.parsing, workers))
        stream = Documents(job, encoder(batches(job, journal.place)), journal, bar)
        dtype = token_type(tokenizer.vocab_size)
        while stream.pending is not None:
            name = shard_name(job.prefix, len(journal.shards), None)
            counts = TextCounts()
            with write_shard(name, dtype) as shard:
                while stream.pending is not None and shard.tokens + len(stream.pending) <= job.shard_tokens:
                    shard.add(stream.pending)
                    counts += stream.take()
            record = ShardRecord(name.name, counts, shard.sha256())
            place, skipped = stream.done_with
            journal = dataclasses.replace(journal, shards=(*journal.shards, record), place=place, skipped=skipped)
            journal.write(job.prefix)
    if not journal.shards:
        raise InputError(
            f"the corpus is empty: no document with text in {', '.join(source.name for source in job.sources)} "
            f"({stream.skipped.dropped} records dropped, {stream.skipped.bad} bad)"
        )
    journal = dataclasses.replace(journal, skipped=stream.skipped, complete=True)
    journal.write(job.prefix)
    return journal


def _finish(job: Job, tokenizer: Tokenizer, journal: Journal) -> Manifest:
    """Give the shards their names, copy the tokenizer, write the manifest, and forget the journal."""
    count = len(journal.shards)
    shards = []
    for number, record in enumerate(journal.shards):
        provisional, name = shard_name(job.prefix, number, None), shard_name(job.prefix, number, count)
        for suffix in (".bin", ".idx"):
            source = provisional.with_name(provisional.name + suffix)
            if source.exists():
                source.replace(name.with_name(name.name + suffix))
        shards.append(dataclasses.replace(record, name=name.name))
    tokenizer_file = ""
    if tokenizer.path is not None:
        tokenizer_file = f"{job.prefix.name}.tokenizer{tokenizer.path.suffix}"
        if tokenizer.path.resolve() != (job.prefix.parent / tokenizer_file).resolve():
            shutil.copyfile(tokenizer.path, job.prefix.parent / tokenizer_file)
    manifest = Manifest(
        TokenizerRecord(
            tokenizer.kind, tokenizer_file, tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_document
        ),
        tuple(shards),
        journal.totals(),
        tuple(_source_record(source) for source in job.sources),
        journal.skipped,
        journal.identity,
    )
    manifest.write(job.prefix)
    journal_path(job.prefix).unlink(missing_ok=True)
    return manifest


def _source_record(source: Source) -> SourceRecord:
    is_file = source.path is not None and source.path.is_file()
    return SourceRecord(source.name, source.size, sha256_of(source.path) if is_file and source.path else None)


def shard_name(prefix: Path, number: int, count: int | None) -> Path:
    """PREFIX-00003-of-00012, or PREFIX-00003-of-unfinished while the count is not known."""
    return prefix.with_name(f"{prefix.name}-{number:05d}-of-{'unfinished' if count is None else f'{count:05d}'}")
