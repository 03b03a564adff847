"""Text to token shards: any number of processes, killed at any moment, one and the same result.

One process reads records in order and writes documents in order; workers do the rest. A shard ends where the next
document would make it too long, so shards are a function of the input alone. After each shard, and where a run stops at
a bad record, the journal says what is on disk and where to go on; a run that finds a journal of its own does so.
"""

import dataclasses
import errno
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tqdm import tqdm

from ecp_scale.cluster.lock import only_writer
from ecp_scale.data.manifest import Manifest, ShardRecord, SourceRecord, TextCounts, TokenizerRecord, manifest_path
from ecp_scale.data.tokenizer import Tokenizer, gives_texts_back
from ecp_scale.errors import InputError
from ecp_scale.files import copy_file
from ecp_scale.preparation.collecting import Collector, Snapshot
from ecp_scale.preparation.cutting import PIECE_CHARACTERS, Cutter
from ecp_scale.preparation.encoding import Encoder, Encoding
from ecp_scale.preparation.finding import find_sources
from ecp_scale.preparation.interrupts import Interrupts
from ecp_scale.preparation.journal import Identity, Journal, journal_path
from ecp_scale.preparation.outputs import Outputs, shard_name
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.preparation.sources import HUB, ChangedSourceError, Place, Source, content_hash, has_more
from ecp_scale.preparation.splitting import block_characters
from ecp_scale.preparation.stream import Job, OnError, batches
from ecp_scale.preparation.writing import publish, remove_stale


def preprocess(
    inputs: Sequence[str],
    tokenizer_spec: str,
    output_prefix: str,
    *,
    parsing: Parsing | None = None,
    end_token: str | None = None,
    validation_share: float = 0.0,
    workers: int = 1,
    shard_tokens: int = 1 << 30,
    on_error: OnError = "stop",
    part: tuple[int, int] = (1, 1),
    progress: bool = False,
) -> Manifest:
    """Write shards, a copy of the tokenizer and the manifest, which comes last.

    Args:
        inputs: files, patterns, folders, ``-`` and hub datasets, see ``ecp_scale.preparation.finding``.
        tokenizer_spec: see ``ecp_scale.data.tokenizer.load_tokenizer``.
        output_prefix: folder and name that every written file begins with.
        parsing: text's key, filters and preparation.
        end_token: the entry that ends a document; None takes the tokenizer's own.
        validation_share: share of the text that goes to PREFIX-validation, the rest to PREFIX-train; 0 writes PREFIX.
        workers: tokenizing processes.
        shard_tokens: most tokens of a shard.
        on_error: what to do with a bad record or file: stop, keeping what is finished so far, or skip it, counting.
        part: which share of the sources to do, from 1, and of how many.
        progress: whether to show a progress bar.

    Returns:
        The manifest, of the training shards where a share is set aside.

    Raises:
        InputError: if an input, the tokenizer or the output folder cannot be used, or another process writes there.
    """
    if workers < 1 or shard_tokens < 2:
        raise InputError(f"workers is {workers} and shard_tokens {shard_tokens}, expected at least 1 and 2")
    if not 0 <= validation_share < 1:
        raise InputError(f"validation_share is {validation_share}, expected at least 0 and less than 1")
    with _write_errors(Path(output_prefix)):
        prefix = _checked_prefix(output_prefix)
    encoding = Encoding(tokenizer_spec, end_token, parsing or Parsing(), validation_share)
    tokenizer = encoding.load_tokenizer()
    found = find_sources(inputs)
    _check_records(found.sources, encoding)
    job = Job(tuple(share_of(found.sources, *part)), encoding, prefix, shard_tokens, on_error, part)
    with _write_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(sorted({prefix, *job.outputs})):
            identity = job.identity(tokenizer)
            if not journal_path(prefix).exists() and all(manifest_path(output).exists() for output in job.outputs):
                return _finished(job, identity)
            journal = _begun(job, identity, found.sources)
            if not journal.complete:
                journal = _write_shards(job, tokenizer, journal, workers, progress)
            return _finish(job, tokenizer, journal, found.reasons)


def _check_records(sources: Sequence[Source], encoding: Encoding) -> None:
    if encoding.parsing.marks and encoding.control:
        raise InputError("a recipe that prepares texts does not go with prompts or conversations")
    for source in sources:
        if encoding.parsing.marks and source.format(encoding.parsing.reading) == "text":
            raise InputError(f"{source.name}: plain text has no keys, expected records with prompts or conversations")


def _checked_prefix(name: str) -> Path:
    prefix = Path(name)
    if not prefix.name or name.endswith(("/", "/.")) or prefix.name == "..":
        raise InputError(f"--output-prefix {name!r} names a folder; expected a folder and the beginning of a file name")
    if prefix.is_dir():
        raise InputError(
            f"--output-prefix {name} is a folder; expected a beginning of file names, such as {name}/train"
        )
    return prefix


@contextmanager
def _write_errors(prefix: Path) -> Iterator[None]:
    """Say in one line what cannot be written, and that nothing is lost where the disk is full."""
    try:
        yield
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


def _finished(job: Job, identity: Identity) -> Manifest:
    """The manifest of a run that needs nothing more, if it is this one and its sources are what they were."""
    manifests = {output: Manifest.read(output) for output in job.outputs}
    for output, manifest in manifests.items():
        before = Identity(manifest.settings, tuple(source.name for source in manifest.sources))
        identity.check(manifest_path(output), before)
    for source, place in _check_sources(job, manifests[job.outputs[0]].sources):
        if source.path is not None and has_more(source, job.encoding.parsing.reading, place):
            raise ChangedSourceError(
                f"{source.name}: has grown behind its first {place.record} records since {job.prefix} was finished; "
                "choose another prefix"
            )
    return manifests[job.outputs[0]]


def _check_sources(job: Job, read: Sequence[SourceRecord]) -> list[tuple[Source, Place]]:
    """Refuse a source whose content has changed in what was read of it; those that were read again, and up to where.

    A dataset of the hub is not read again.

    Raises:
        ChangedSourceError: naming it.
    """
    again = []
    for number, (source, record) in enumerate(zip(job.sources, read, strict=False)):
        if not source.name.startswith(HUB) and (source.fingerprint != record.fingerprint or not source.fingerprint):
            place = Place(number, record.records, record.bytes)
            if content_hash(source, job.encoding.parsing.reading, place) != record.sha256:
                raise ChangedSourceError(source.changed(place))
            again.append((source, place))
    return again


def _begun(job: Job, identity: Identity, all_sources: Sequence[Source]) -> Journal:
    """The journal of this run, a new one where it has not begun."""
    path = journal_path(job.prefix)
    if path.exists():
        journal = Journal.read_from(path)
        identity.check(path, journal.identity)
        _check_sources(job, journal.read)
        for output, shards in zip(job.outputs, journal.shards, strict=True):
            for record in shards:
                publish(output.with_name(record.name))
        return journal
    for output in job.outputs:
        if manifest_path(output).exists():
            raise InputError(
                f"{manifest_path(output)}: belongs to another run; choose another prefix or remove its files"
            )
        remove_stale(output)
    return Journal.begin(path, identity, len(job.outputs), block_characters(all_sources, job.encoding))


def _write_shards(job: Job, tokenizer: Tokenizer, journal: Journal, workers: int, progress: bool) -> Journal:
    """Write the shards that the journal lacks, and the journal after each."""
    total = sum(source.size for source in job.sources)
    blocks = journal.block_characters is not None
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=total,
                unit="B",
                unit_scale=True,
                disable=None if progress else True,
                desc="tokenize",
                smoothing=0.05,
            )
        )
        interrupts = stack.enter_context(Interrupts())
        encoder = stack.enter_context(Encoder(job.encoding, workers, interrupts))
        cutter = Cutter(tokenizer, job.encoding.control, journal.block_characters or PIECE_CHARACTERS)
        digest = hashlib.sha256()
        collector = Collector(job, tokenizer, journal, digest, blocks, bar)
        outputs = stack.enter_context(closing(Outputs(job, tokenizer.vocab_size, journal)))
        raw = batches(job, journal.state, digest, cutter, blocks)
        snapshot: Snapshot | None = None
        try:
            for collected in collector.documents(encoder(raw)):
                with interrupts.held:
                    finished = outputs.make_room(collected.output, collected.counts[1])
                    if finished and snapshot is not None:
                        outputs.commit(snapshot.settle(), collector.read[: snapshot.sources])
                    outputs.add(collected.output, collected.ids, collected.counts)
                    snapshot = collected.snapshot
        except (InputError, KeyboardInterrupt) as error:
            # Only what this run has added: at the place where it began it has not yet hashed what lies before.
            if snapshot is not None and not isinstance(error, ChangedSourceError):
                with interrupts.held:
                    outputs.commit(snapshot.settle(), collector.read[: snapshot.sources])
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("what is written stays: the same command goes on there") from None
            raise
        if not all(outputs.used):
            raise InputError(_empty(job, outputs, collector))
        with interrupts.held:
            outputs.finish()
            outputs.commit(collector.snapshot().settle(), collector.read, complete=True)
        return outputs.journal


def _empty(job: Job, outputs: Outputs, collector: Collector) -> str:
    names = [source.name for source in job.sources]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    if any(outputs.used):
        return (
            f"--validation-share {job.encoding.validation_share} leaves nothing for training or for validation: "
            f"{collector.written} documents in {shown} ({collector.skipped})"
        )
    return f"the corpus is empty: no document with text in {shown} ({collector.skipped})"


def _finish(job: Job, tokenizer: Tokenizer, journal: Journal, unread: dict[str, dict[str, object]]) -> Manifest:
    """Give the shards their names, copy the tokenizer, write the manifests, and forget the journal."""
    manifests = {}
    for prefix, shards in zip(job.outputs, journal.shards, strict=True):
        records = tuple(_name_shard(prefix, number, len(shards), record) for number, record in enumerate(shards))
        tokenizer_file = ""
        if tokenizer.path is not None:
            tokenizer_file = f"{prefix.name}.tokenizer{tokenizer.path.suffix}"
            if tokenizer.path.resolve() != (prefix.parent / tokenizer_file).resolve():
                copy_file(tokenizer.path, prefix.parent / tokenizer_file)
        manifests[prefix] = Manifest(
            TokenizerRecord(
                tokenizer.kind,
                tokenizer_file,
                tokenizer.sha256,
                tokenizer.vocab_size,
                tokenizer.end_of_document,
                gives_texts_back(tokenizer),
            ),
            records,
            sum((record.counts for record in records), TextCounts()),
            journal.read,
            journal.state.skipped,
            {**journal.identity.settings, "block_characters": journal.block_characters},
            unread,
            job.encoding.parsing.marks,
        )
    for prefix, manifest in manifests.items():
        manifest.write(prefix)
        remove_stale(prefix)
    journal.path.unlink()
    return manifests[job.outputs[0]]


def _name_shard(prefix: Path, number: int, count: int, record: ShardRecord) -> ShardRecord:
    provisional, name = shard_name(prefix, number, None), shard_name(prefix, number, count)
    for suffix in (".bin", ".idx"):
        source = provisional.with_name(provisional.name + suffix)
        if source.exists():
            source.replace(name.with_name(name.name + suffix))
    return dataclasses.replace(record, name=name.name)
