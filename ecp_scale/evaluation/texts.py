"""Texts to evaluate: raw files through the model's tokenizer, or shards that were made with it."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import manifest_path
from ecp_scale.data.marks import plain
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.data.tokenizer_kinds import UnencodableError
from ecp_scale.errors import InputError
from ecp_scale.evaluation.perplexity import Ids, Text
from ecp_scale.preparation.cutting import Cutter
from ecp_scale.preparation.documents import read_parts
from ecp_scale.preparation.finding import find_sources
from ecp_scale.preparation.measuring import measure
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.zero.state_files import free_bytes

SPOOLED = 1 << 22
"""Ids of shards that are read at a time, and bytes that are written at a time."""
ID = np.dtype(np.int32)
"""Type of the ids in a temporary file."""


def read_text(data: str, tokenizer: Tokenizer, text_key: str = "text") -> Text:
    """Read a file, a folder, or the prefix of shards.

    Raises:
        InputError: if there is no text, or the shards were made with another tokenizer.
    """
    if manifest_path(Path(data)).exists():
        corpus = open_shards(data, tokenizer)
        if corpus.manifest.marked:
            raise InputError(
                f"shards {data} mark tokens without a loss, so there are no figures per word and byte of them; name "
                "the text itself, or look at the validation loss of a run"
            )
        totals = corpus.manifest.totals
        spool = Spool()
        for start in range(0, corpus.tokens, SPOOLED):
            spool.add(corpus.read(start, min(SPOOLED, corpus.tokens - start)))
        return Text(spool.ids(), totals.bytes, totals.words, totals.lines, totals.unknown)
    return measure_text(_documents(read_parts(find_sources([data]).sources, Parsing(text_key))), tokenizer, data)


def _documents(parts: Iterable[tuple[str, bool]]) -> Iterator[Iterator[str]]:
    """Each document as its parts, which must be taken before the next one."""
    remaining = iter(parts)

    def document(part: str, last: bool) -> Iterator[str]:
        yield part
        while not last:
            part, last = next(remaining)
            yield part

    for part, last in remaining:
        yield document(part, last)


def measure_text(documents: Iterable[Iterable[str]], tokenizer: Tokenizer, name: str = "text") -> Text:
    """Ids and sizes of some documents.

    Args:
        documents: in order, each in parts of which one is in memory at a time.
        tokenizer: of the model that scores them.
        name: of the text, for an error.

    Raises:
        InputError: if the tokenizer cannot encode a document.
    """
    spool = Spool()
    size = words = lines = unknown = 0
    cutter = Cutter(tokenizer)
    for document in documents:
        goes_on = False  # whether the last character is of a word that the next piece may continue
        try:
            for piece in cutter.pieces(document):
                ids = tokenizer.encode_batch([piece.encoded])[0]
                unknown += 0 if tokenizer.unknown is None else int(np.count_nonzero(ids == tokenizer.unknown))
                spool.add(ids)
                counts = measure(piece.text)
                size, words, lines = size + counts[0], words + counts[1], lines + counts[2]
                words -= goes_on and not piece.text[:1].isspace() and bool(piece.text)
                goes_on = not piece.text[-1:].isspace() if piece.text else goes_on
        except UnencodableError as error:
            raise InputError(f"{name}: a document cannot be encoded: {error}") from error
        spool.add(np.array([tokenizer.end_of_document]))
    return Text(spool.ids(), size, words, lines, unknown)


class Spool:
    """Ids in a temporary file: those of a gigabyte of text take four in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=SPOOLED)  # noqa: SIM115, it lives as long as the ids

    def add(self, ids: npt.NDArray[np.integer]) -> None:
        """Append some."""
        with self._naming_the_folder():
            self._file.write(ids.astype(np.int32).tobytes())

    def ids(self) -> "SpooledIds":
        """All of them."""
        with self._naming_the_folder():
            self._file.flush()
        return SpooledIds(self._file)

    @contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """Say where there is no room."""
        try:
            yield
        except OSError as error:
            folder = Path(tempfile.gettempdir())
            raise InputError(
                f"the ids of the text do not fit into {folder} ({error.strerror}), where {free_bytes(folder / 'x'):,} "
                "bytes are free; name another folder with TMPDIR"
            ) from error


class SpooledIds:
    """Ids in a file, of which a slice is read when it is asked for. Trap: pages of a mapped file count as memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._count = file.tell() // ID.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> Ids:
        start, stop, _ = part.indices(self._count)
        found = np.empty(max(0, stop - start), dtype=ID)
        into = memoryview(found)  # type: ignore[arg-type]
        read = os.preadv(self._file.fileno(), [into], start * ID.itemsize) if len(found) else 0
        assert read == found.nbytes, "the temporary file has been cut"
        return found


def open_shards(prefix: str, tokenizer: Tokenizer) -> Corpus:
    """Open shards that must have been made with ``tokenizer``.

    Raises:
        InputError: if they were made with another.
    """
    corpus = Corpus(prefix, sequence_length=1)
    if corpus.tokenizer.sha256 != tokenizer.sha256:
        raise InputError(
            f"shards {prefix} were made with tokenizer {corpus.tokenizer.sha256[:12]}..., "
            f"the model with {tokenizer.sha256[:12]}... ({tokenizer.path})"
        )
    return corpus


def count_tokens(corpus: Corpus) -> Ids:
    """Occurrences (V,) of every id in the shards."""
    counts = np.zeros(corpus.tokenizer.vocab_size, dtype=np.int64)
    for number in range(len(corpus.manifest.shards)):
        found = np.bincount(plain(corpus.shard(number).ids), minlength=len(counts))
        if len(found) > len(counts):
            raise InputError(f"shards {corpus.prefix}: hold id {len(found) - 1}, but the tokenizer has {len(counts)}")
        counts += found
    return counts
