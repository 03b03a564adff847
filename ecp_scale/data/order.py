"""The order of samples: a pure function of (seed, epoch, position), with nothing to store or to build."""

import hashlib

ROUNDS = 6
"""Even, so that the halves end with the widths that they began with."""


class Permutation:
    """A bijection of range(size) in closed form: a Feistel network, walked until it lands inside the range."""

    def __init__(self, size: int, key: str) -> None:
        """Derive the round keys from ``key``; ``size`` is at least 1."""
        assert size >= 1
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = bits - bits // 2
        # The halves differ by a bit where their sum is odd, and swap in every round.
        masks = ((1 << bits // 2) - 1, (1 << self._low_bits) - 1)
        digest = hashlib.sha256(key.encode()).digest() * 2
        self._rounds = [(int.from_bytes(digest[8 * i : 8 * i + 8]) | 1, masks[i % 2]) for i in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """The number that ``index`` is permuted to, both in range(size)."""
        assert 0 <= index < self.size
        index = self._feistel(index)
        while index >= self.size:
            index = self._feistel(index)
        return index

    def _feistel(self, value: int) -> int:
        left, right = value >> self._low_bits, value & ((1 << self._low_bits) - 1)
        for key, mask in self._rounds:
            mixed = ((right + key) * 0x9E3779B97F4A7C15) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 29)) * key) & (2**64 - 1)
            left, right = right, left ^ ((mixed >> 32) & mask)
        return (left << self._low_bits) | right


class SampleOrder:
    """Which window each sample of a corpus is: every window once per epoch, in another order each epoch.

    ``number`` tells the corpora of a blend apart, so that their orders differ.
    """

    def __init__(self, windows: int, seed: int, number: int = 0) -> None:
        self.windows = windows
        self.key = f"{seed}/{number}" if number else f"{seed}"
        self._epoch = -1
        self._permutation = Permutation(1, "")

    def window(self, sample: int) -> int:
        """Window of the run's sample number ``sample``."""
        epoch, position = divmod(sample, self.windows)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(self.windows, f"{self.key}/{epoch}")
        return self._permutation(position)
