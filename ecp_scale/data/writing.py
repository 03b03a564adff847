"""Writing shards that can be left at any document and gone on with, by this process or a later one."""

import dataclasses
import hashlib
import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ecp_scale.data.files import atomic_write, naming, sync_folder
from ecp_scale.data.manifest import ShardRecord, TextCounts
from ecp_scale.data.shards import Tokens, index_of

CHUNK_TOKENS = 1 << 20


class Spool:
    """The ids of one long document on disk, until it is known whether and where it is stored."""

    def __init__(self, folder: Path, dtype: type[np.generic]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by whoever takes the document)
        self._dtype = np.dtype(dtype)
        self.counts = TextCounts()

    def add(self, ids: Tokens, counts: TextCounts) -> None:
        """Append a piece."""
        self._file.write(ids.astype(self._dtype, copy=False).tobytes())
        self.counts += counts

    def chunks(self) -> Iterator[Tokens]:
        """All ids, some at a time."""
        self._file.seek(0)
        while content := self._file.read(CHUNK_TOKENS * self._dtype.itemsize):
            yield np.frombuffer(content, dtype=self._dtype)

    def close(self) -> None:
        """Free the disk."""
        self._file.close()


@dataclasses.dataclass(frozen=True)
class Document:
    """The ids of a document, its end included, and the size of its text."""

    ids: Tokens | Spool
    counts: TextCounts

    def chunks(self) -> Iterator[Tokens]:
        """All ids, some at a time."""
        if isinstance(self.ids, Spool):
            yield from self.ids.chunks()
            self.ids.close()
        else:
            yield self.ids


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
        self.counts = begun
        self._bin = self._open(".bin", begun.tokens * self._dtype.itemsize)
        self._table = self._open(".lengths", begun.documents * self._lengths.itemsize)
        while block := self._bin.read(1 << 20):
            self._digest.update(block)
        self._lengths.frombytes(self._table.read())

    def _open(self, suffix: str, size: int) -> BinaryIO:
        path = hidden(self._prefix, suffix)
        with naming(path):
            file = path.open("r+b" if size else "w+b")
            file.truncate(size)
            return file

    def add(self, document: Document) -> None:
        """Append a document."""
        with naming(hidden(self._prefix, ".bin")):
            for chunk in document.chunks():
                content = chunk.astype(self._dtype, copy=False).tobytes()
                self._digest.update(content)
                self._bin.write(content)
            length = array("i", [document.counts.tokens])
            self._lengths += length
            self._table.write(length.tobytes())
        self.counts += document.counts

    def sync(self) -> None:
        """Make what was added survive a crash."""
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
