"""The ledger: a sum of hashes that stands for every window that a run has read, whatever the ranks that read it."""

import hashlib
import struct
from collections.abc import Sequence

LANES = 4
"""A ledger entry travels as so many 16-bit numbers, whose sums over ranks and samples stay exact in int64."""


def ledger_entry(sample: int, corpus: int, window: int, digest: str = "") -> int:
    """64 bits that stand for "sample number ``sample`` was this window"; entries add up modulo 2^64.

    Args:
        sample: number of the sample in the run.
        corpus: number of the corpus.
        window: number of the window in the corpus.
        digest: of the tokens of the corpus, see ``Manifest.digest``; empty as in runs of earlier versions.
    """
    packed = struct.pack("<QQQ", sample, corpus, window) + bytes.fromhex(digest)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def to_lanes(entry: int) -> list[int]:
    """The 16-bit parts of an entry, lowest first."""
    return [(entry >> (16 * lane)) & 0xFFFF for lane in range(LANES)]


def from_lanes(lanes: Sequence[int]) -> int:
    """The sum of entries from the sums of their parts."""
    return sum(value << (16 * lane) for lane, value in enumerate(lanes)) % 2**64
