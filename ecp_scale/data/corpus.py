"""A corpus: the shards of one prefix as one stream of tokens, cut into windows."""

from pathlib import Path

import numpy as np

from ecp_scale.data.manifest import Manifest
from ecp_scale.data.shards import Tokens, TokenShard
from ecp_scale.errors import InputError


class Corpus:
    """Token stream of a prefix, mapped into memory.

    Window i holds the ``sequence_length`` + 1 tokens from ``i * sequence_length`` on, so that every token but the
    first is a target exactly once per epoch.
    """

    def __init__(self, prefix: str, sequence_length: int) -> None:
        """Open and check the manifest, the tokenizer beside it and every shard.

        Raises:
            InputError: naming the file that is missing, damaged or does not belong to the others.
        """
        self.prefix = Path(prefix)
        self.sequence_length = sequence_length
        self.manifest = Manifest.read(self.prefix)
        self.tokenizer = self.manifest.load_tokenizer(self.prefix)
        self.shards = [TokenShard(self.prefix.parent / record.name) for record in self.manifest.shards]
        for shard, record in zip(self.shards, self.manifest.shards, strict=True):
            if shard.tokens != record.counts.tokens:
                raise InputError(
                    f"{self.prefix.parent / record.name}.idx: {shard.tokens} tokens, "
                    f"but the manifest says {record.counts.tokens}"
                )
        self.tokens = sum(shard.tokens for shard in self.shards)
        self._borders = np.cumsum([0] + [shard.tokens for shard in self.shards], dtype=np.int64)
        self.windows = (self.tokens - 1) // sequence_length
        if self.windows < 1:
            raise InputError(
                f"corpus {prefix}: {self.tokens} tokens, expected at least one window of {sequence_length} + 1"
            )

    def read(self, start: int, count: int) -> Tokens:
        """``count`` tokens of the stream from ``start`` on, across shards, as int64."""
        parts = []
        shard = int(np.searchsorted(self._borders, start, side="right")) - 1
        while count:
            offset = start - int(self._borders[shard])
            part = self.shards[shard].ids[offset : offset + count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def window(self, number: int) -> Tokens:
        """The n + 1 tokens of one window, as int64."""
        return self.read(number * self.sequence_length, self.sequence_length + 1)
