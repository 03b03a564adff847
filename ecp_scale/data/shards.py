"""Token shards in Megatron's format: PREFIX.bin holds token ids, PREFIX.idx the documents' lengths and places.

Layout of .idx (little endian): magic "MMIDIDX\\0\\0", uint64 version 1, uint8 type code, uint64 number of sequences,
uint64 number of document borders, int32 length of each sequence, int64 byte offset of each sequence, int64 borders.
Here every document is one sequence.
"""

import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecp_scale.errors import InputError
from ecp_scale.files import raised_limit_of_files

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


def index_bytes(documents: int) -> int:
    """Size of the .idx of so many documents."""
    return HEADER.size + documents * 12 + (documents + 1) * 8


def index_of(lengths: npt.NDArray[np.int32], dtype: "np.dtype[Any]") -> bytes:
    """Content of the .idx of documents of these lengths in tokens."""
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    code = next(code for code, known in TYPE_CODES.items() if np.dtype(known) == dtype)
    borders = np.arange(len(lengths) + 1, dtype=np.int64)
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(borders))
    return b"".join((header, lengths.tobytes(), (offsets * dtype.itemsize).tobytes(), borders.tobytes()))


class TokenShard:
    """A shard on disk, mapped into memory. Opening it checks sizes and both ends of the tables, and reads no more."""

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
        tables = index[HEADER.size :]
        self.lengths = tables[: sequences * 4].view(np.int32)
        self._offsets = tables[sequences * 4 : sequences * 12].view(np.int64)
        end = int(self._offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        data = _map_bytes(data_path)
        if len(data) != end:
            raise InputError(
                f"{data_path}: {len(data)} bytes, expected {end} by {index_path.name}; "
                "the file is cut short or belongs to another index"
            )
        self.ids: Tokens = data.view(self.dtype)
        self.tokens = len(self.ids)

    def document(self, number: int) -> Tokens:
        """Token ids of one document."""
        start = int(self._offsets[number]) // self.dtype.itemsize
        return self.ids[start : start + int(self.lengths[number])]

    def problems(self) -> Iterator[str]:
        """What is wrong with the tables inside the index; reads all of it."""
        sizes = self.lengths.astype(np.int64) * self.dtype.itemsize
        if len(sizes) and (sizes.min() <= 0 or not np.array_equal(self._offsets, np.cumsum(sizes) - sizes)):
            yield "documents do not follow one another"


class OpenShards:
    """Shards that are open; of too many for the limit on descriptors, the least recently read are closed."""

    def __init__(self, most: int | None = None) -> None:
        """Keep ``most`` open; None takes what the limit allows, which is raised as far as it may be."""
        self._most = most
        self._shards: OrderedDict[Path, TokenShard] = OrderedDict()
        self._lock = threading.Lock()  # a step is read ahead in a thread while the loop validates

    def shard(self, prefix: Path) -> TokenShard:
        """A shard, opened where it is not.

        Raises:
            InputError: if it is damaged.
        """
        with self._lock:
            if prefix not in self._shards:
                self._most = self._most or _shards_by_limit()
                while len(self._shards) >= self._most:
                    self._shards.popitem(last=False)
                self._shards[prefix] = TokenShard(prefix)
            self._shards.move_to_end(prefix)
            return self._shards[prefix]


OPEN = OpenShards()
"""The open shards of this process."""
DESCRIPTORS_OF_OTHERS = 256
"""Descriptors that are left to sockets, logs and libraries."""


def _shards_by_limit() -> int:
    limit = raised_limit_of_files()
    # Trap: a memory map keeps a descriptor of its own, and a shard has two of them.
    return max(1, (limit - min(DESCRIPTORS_OF_OTHERS, limit // 2)) // 2)


def _map_bytes(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:
            return np.empty(0, dtype=np.uint8)
        # asarray: slices of the memmap class take several times as long.
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
