"""Writing shards that can be left at any document and gone on with, by this process or a later one."""

import dataclasses
import hashlib
import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from operator import add
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from ecp_scale.data.manifest import ShardRecord, TextCounts
from ecp_scale.data.shards import Tokens, index_of
from ecp_scale.errors import InputError
from ecp_scale.files import atomic_write, naming, sync_folder

CHUNK_TOKENS = 1 << 20
NOTHING = dataclasses.astuple(TextCounts())


Counts: TypeAlias = tuple[int, ...]
"""The fields of ``TextCounts`` as plain numbers: a corpus of short lines has a document every few microseconds."""


class TokenBuffer:
    """The ids of one long text on disk, until it is known whether and where its documents are stored."""

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed when the text has been taken)
        self._dtype = np.dtype(dtype)
        self.tokens = 0

    def add(self, ids: Tokens) -> None:
        """Append a piece."""
        self._file.write(ids.astype(self._dtype, copy=False).tobytes())
        self.tokens += len(ids)

    def chunks(self, start: int, count: int) -> Iterator[Tokens]:
        """Ids from one place on, some at a time."""
        self._file.seek(start * self._dtype.itemsize)
        while count:
            content = self._file.read(min(count, CHUNK_TOKENS) * self._dtype.itemsize)
            yield np.frombuffer(content, dtype=self._dtype)
            count -= len(content) // self._dtype.itemsize

    def close(self) -> None:
        """Free the disk."""
        self._file.close()


@dataclasses.dataclass
class BufferedDocument:
    """A document of a long text: its output, where its ids lie in the buffer, and the size of its text."""

    buffer: TokenBuffer
    output: int
    start: int
    counts: Counts = NOTHING

    def add(self, ids: Tokens, counts: Counts) -> None:
        """Append a piece."""
        self.buffer.add(ids)
        self.counts = tuple(map(add, self.counts, counts))

    def chunks(self) -> Iterator[Tokens]:
        """All ids, some at a time."""
        return self.buffer.chunks(self.start, self.counts[1])


class ShardWriter:
    """One shard that is being written: its tokens and the lengths of its documents, in two hidden files beside it.

    They stay where the program ends, and belong to whoever holds the lock of the prefix.
    """

    def __init__(self, prefix: Path, dtype: type[np.generic], begun: TextCounts) -> None:
        """Begin the shard PREFIX, or go on with what an earlier run has written and synced of it: ``begun``."""
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._digest = hashlib.sha256()
        self._lengths = array("i")
        self._counts: Counts = dataclasses.astuple(begun)
        self.tokens = begun.tokens
        self._bin = self._open(".bin", begun.tokens * self._dtype.itemsize)
        self._table = self._open(".lengths", begun.documents * self._lengths.itemsize)
        while block := self._bin.read(1 << 20):
            self._digest.update(block)
        self._lengths.frombytes(self._table.read())
        self._synced = len(self._lengths)

    def _open(self, suffix: str, size: int) -> BinaryIO:
        path = hidden(self._prefix, suffix)
        with naming(path):
            found = path.stat().st_size if size else 0
            if found < size:
                raise InputError(f"{path}: {found} bytes, but the journal says that {size} were written; remove both")
            file = path.open("r+b" if size else "w+b")
            file.truncate(size)
            return file

    @property
    def counts(self) -> TextCounts:
        """How much text was added."""
        return TextCounts(*self._counts)

    def add(self, ids: Tokens | BufferedDocument, counts: Counts) -> None:
        """Append a document."""
        try:
            for chunk in ids.chunks() if isinstance(ids, BufferedDocument) else (ids,):
                content = chunk.astype(self._dtype, copy=False).tobytes()
                self._digest.update(content)
                self._bin.write(content)
        except OSError as error:
            error.filename = error.filename or str(hidden(self._prefix, ".bin"))
            raise
        self._lengths.append(counts[1])
        self.tokens += counts[1]
        self._counts = tuple(map(add, self._counts, counts))

    def sync(self) -> None:
        """Make what was added survive a crash."""
        with naming(hidden(self._prefix, ".lengths")):
            self._table.write(self._lengths[self._synced :].tobytes())
            self._synced = len(self._lengths)
        for suffix, file in ((".bin", self._bin), (".lengths", self._table)):
            with naming(hidden(self._prefix, suffix)):
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> ShardRecord:
        """Write the index; the tokens get their name by ``publish``, once the journal has this record."""
        self.sync()
        index = index_of(np.frombuffer(self._lengths, dtype=np.int32), self._dtype)
        with atomic_write(self._prefix.with_name(self._prefix.name + ".idx")) as file:
            file.write(index)
        self.close()
        hashes = {"bin": self._digest.hexdigest(), "idx": hashlib.sha256(index).hexdigest()}
        return ShardRecord(self._prefix.name, self.counts, hashes)

    def close(self) -> None:
        """Close the files, which stay."""
        self._bin.close()
        self._table.close()


def publish(prefix: Path) -> None:
    """Give the tokens of a finished shard their name, if they do not have it yet."""
    if hidden(prefix, ".bin").exists():
        hidden(prefix, ".bin").replace(prefix.with_name(prefix.name + ".bin"))
        sync_folder(prefix.parent)
    hidden(prefix, ".lengths").unlink(missing_ok=True)


def remove_stale(prefix: Path) -> None:
    """Remove the temporary files that killed runs have left under a prefix, whose lock is held."""
    written = rf"\.{re.escape(prefix.name)}(-\d{{5,}}-of-\w+|\.(manifest|unfinished|tokenizer))\.\S+\.tmp"
    for path in prefix.parent.iterdir():
        if re.fullmatch(written, path.name):
            path.unlink()


def hidden(prefix: Path, suffix: str) -> Path:
    """File of a shard that is being written."""
    return prefix.with_name(f".{prefix.name}{suffix}.tmp")
