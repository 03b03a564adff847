"""The data digest: a sum of hashes of every window that a run has read, whatever the ranks that read it."""

import hashlib
import struct
from collections.abc import Sequence

PARTS = 4
"""A digest travels as so many 16-bit numbers, whose sums over ranks and samples stay exact in int64."""


def sample_digest(sample: int, corpus: int, window: int, digest: str = "") -> int:
    """Hash (64 bits) of "sample number ``sample`` was this window"; a run's digest is their sum modulo 2^64.

    Args:
        sample: number of the sample in the run.
        corpus: number of the corpus.
        window: number of the window in the corpus.
        digest: of the tokens of the corpus, see ``Manifest.digest``; empty as in runs of earlier versions.
    """
    packed = struct.pack("<QQQ", sample, corpus, window) + bytes.fromhex(digest)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def to_parts(digest: int) -> list[int]:
    """The 16-bit parts of a digest, lowest first."""
    return [(digest >> (16 * part)) & 0xFFFF for part in range(PARTS)]


def from_parts(parts: Sequence[int]) -> int:
    """The sum of digests, modulo 2^64, from the sums of their parts."""
    return sum(value << (16 * part) for part, value in enumerate(parts)) % 2**64
