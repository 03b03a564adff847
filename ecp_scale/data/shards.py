"""Token shards in Megatron's format: PREFIX.bin holds token ids, PREFIX.idx the documents' lengths and places.

Layout of .idx (little endian): magic "MMIDIDX\\0\\0", uint64 version 1, uint8 type code, uint64 number of sequences,
uint64 number of document borders, int32 length of each sequence, int64 byte offset of each sequence, int64 borders.
Here every document is one sequence.
"""

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ecp_scale.data.files import atomic_write
from ecp_scale.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Megatron's codes of the integer types."""

Tokens = npt.NDArray[Any]


def token_type(vocab_size: int) -> type[np.generic]:
    """The narrowest type that Megatron also picks for a vocabulary."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class ShardWriter:
    """Appends documents to a .bin that is being written and keeps what its .idx needs."""

    def __init__(self, file: BinaryIO, dtype: type[np.generic]) -> None:
        self._file = file
        self._dtype = np.dtype(dtype)
        self._lengths: list[int] = []
        self.tokens = 0

    def add(self, document: Tokens) -> None:
        """Append one document."""
        self._file.write(document.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(len(document))
        self.tokens += len(document)

    def write_index(self, file: BinaryIO) -> None:
        """Write the .idx of everything that was added."""
        lengths = np.array(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        code = next(code for code, dtype in TYPE_CODES.items() if np.dtype(dtype) == self._dtype)
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.tobytes())
        file.write((offsets * self._dtype.itemsize).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


@contextmanager
def write_shard(prefix: Path, dtype: type[np.generic]) -> Iterator[ShardWriter]:
    """Write PREFIX.bin and PREFIX.idx; both appear when the block ends without an error."""
    with ExitStack() as stack:
        index = stack.enter_context(atomic_write(prefix.with_name(prefix.name + ".idx")))
        data = stack.enter_context(atomic_write(prefix.with_name(prefix.name + ".bin")))
        writer = ShardWriter(data, dtype)
        yield writer
        writer.write_index(index)


class TokenShard:
    """A shard on disk, mapped into memory; its structure is checked when it is opened."""

    def __init__(self, prefix: Path) -> None:
        """Open PREFIX.idx and PREFIX.bin.

        Raises:
            InputError: naming the file that is missing, cut short or of another format.
        """
        index_path, data_path = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
        index = _map_bytes(index_path)
        if len(index) < HEADER.size:
            raise InputError(f"{index_path}: {len(index)} bytes, expected at least the header's {HEADER.size}")
        magic, version, code, sequences, borders = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC or version != 1 or code not in TYPE_CODES:
            raise InputError(f"{index_path}: not a Megatron index (magic {magic!r}, version {version}, type {code})")
        self.dtype = np.dtype(TYPE_CODES[code])
        expected = HEADER.size + sequences * 12 + borders * 8
        if len(index) != expected:
            raise InputError(f"{index_path}: {len(index)} bytes, expected {expected} for {sequences} sequences")
        self.lengths = index[HEADER.size :][: sequences * 4].view(np.int32)
        self.tokens = int(self.lengths.sum(dtype=np.int64))
        data = _map_bytes(data_path)
        if len(data) != self.tokens * self.dtype.itemsize:
            raise InputError(
                f"{data_path}: {len(data)} bytes, expected {self.tokens * self.dtype.itemsize} for the "
                f"{self.tokens} tokens of {index_path.name}; the file is cut short or belongs to another index"
            )
        self.ids: Tokens = data.view(self.dtype)

    def document(self, number: int) -> Tokens:
        """Token ids of one document."""
        start = int(self.lengths[:number].sum(dtype=np.int64))
        return self.ids[start : start + int(self.lengths[number])]


def _map_bytes(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
