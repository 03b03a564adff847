"""A corpus: the shards of one prefix as one stream of tokens, cut into windows."""

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ecp_scale.data.manifest import Manifest, ShardRecord
from ecp_scale.data.shards import OPEN, Tokens, TokenShard, index_bytes
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import DamagedDataError, InputError


class Corpus:
    """Token stream of a prefix, mapped into memory.

    Window i holds the ``sequence_length`` + 1 tokens from ``i * sequence_length`` on, so that every token but the
    first is a target exactly once per epoch. Tokens without a loss are marked, see ``ecp_scale.data.marks``. Of a
    corpus with labels window i is document i.
    """

    def __init__(self, prefix: str, sequence_length: int) -> None:
        """Check the manifest, the tokenizer beside it and the sizes of all shards; they are opened when first read.

        Raises:
            InputError: naming the file that is missing, damaged or does not belong to the others.
        """
        self.prefix = Path(prefix)
        self.manifest = Manifest.read(self.prefix)
        _ = self.tokenizer
        for record in self.manifest.shards:
            _check_sizes(self.prefix.parent, record, self.manifest.dtype)
        counts, entries = self.manifest.totals, self.manifest.tokenizer.vocab_size
        if self.manifest.labels and counts.tokens != counts.documents * (sequence_length + 1):
            raise InputError(
                f"corpus {prefix}: documents of {counts.tokens / max(1, counts.documents):g} tokens with their labels, "
                f"expected model.sequence_length + 1 = {sequence_length + 1}"
            )
        self.lay_out(
            self.manifest.shards,
            sequence_length,
            range(-entries if self.manifest.marked else 0, entries),
            bool(self.manifest.labels),
        )
        if self.windows < 1:
            raise InputError(
                f"corpus {prefix}: {self.tokens} tokens, expected at least one window of {sequence_length} + 1"
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the shards."""
        return self.manifest.load_tokenizer(self.prefix)

    def __getstate__(self) -> dict[str, Any]:
        """What a process gets from the one that opened the corpus.

        It loads the tokenizer itself when it asks for it. The list of sources stays behind: there may be a million.
        """
        state = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        return {**state, "manifest": dataclasses.replace(self.manifest, sources=(), unread={})}

    @cached_property
    def digest(self) -> str:
        """What the tokens are known by, see ``Manifest.digest``."""
        return self.manifest.digest

    def lay_out(
        self, shards: Sequence[ShardRecord], sequence_length: int, stored: range, labelled: bool = False
    ) -> None:
        """Place the shards, of ids in ``stored``, one after another and cut them into windows; touches no file."""
        self.sequence_length = sequence_length
        self._stored = stored
        self._borders = [0, *itertools.accumulate(record.counts.tokens for record in shards)]
        self.tokens = self._borders[-1]
        self._stride = sequence_length + labelled
        self.windows = (self.tokens - (not labelled)) // self._stride

    def shard(self, number: int) -> TokenShard:
        """One shard, opened at its first use.

        Raises:
            InputError: if its index is damaged.
        """
        return OPEN.shard(self.prefix.parent / self.manifest.shards[number].name)

    def read(self, start: int, count: int) -> Tokens:
        """``count`` tokens of the stream from ``start`` on, across shards, as int64.

        Raises:
            DamagedDataError: naming shard and place of an id that the tokenizer does not have.
        """
        parts = []
        number = bisect_right(self._borders, start) - 1
        while count:
            offset = start - self._borders[number]
            part = self.shard(number).ids[offset : offset + count]
            if len(part) and not self._stored.start <= part.min() <= part.max() < self._stored.stop:
                self._refuse(number, offset, part)
            parts.append(part)
            start, count, number = start + len(part), count - len(part), number + 1
        return np.concatenate(parts, dtype=np.int64)

    def _refuse(self, number: int, offset: int, part: Tokens) -> None:
        place = int(np.flatnonzero((part < self._stored.start) | (part >= self._stored.stop))[0])
        raise DamagedDataError(
            f"{self.prefix.parent / self.manifest.shards[number].name}.bin: id {int(part[place])} at place "
            f"{offset + place}, but the tokenizer has {self._stored.stop} entries; see ecp-verify-shards"
        )

    def window(self, number: int) -> Tokens:
        """The n + 1 tokens of one window, as int64."""
        return self.read(number * self._stride, self.sequence_length + 1)


def _check_sizes(folder: Path, record: ShardRecord, dtype: type[np.generic]) -> None:
    width = np.dtype(dtype).itemsize
    expected = {".bin": record.counts.tokens * width, ".idx": index_bytes(record.counts.documents)}
    for suffix, size in expected.items():
        path = folder / (record.name + suffix)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        if found != size:
            raise InputError(
                f"{path}: {found} bytes, expected {size} for the {record.counts.documents} documents and "
                f"{record.counts.tokens} tokens of the manifest; the file is cut short or another one"
            )
