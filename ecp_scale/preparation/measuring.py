"""The size of texts in the units in which figures are given."""

import numpy as np

_BLANKS = "".join(character for character in map(chr, range(0x10000)) if character.isspace())
_IS_BLANK = bytes(chr(byte) in _BLANKS[:10] for byte in range(256))
"""By byte whether it is white space: all ASCII characters that are come first."""

SHORT = 256
"""Bytes below which words are split faster than they are counted."""


def measure(text: str) -> tuple[int, int, int]:
    """Bytes of a text in UTF-8, its words and its line ends.

    Words are what ``len(text.split())`` counts, in a fifth of the time.
    """
    content = text.encode()
    lines = content.count(b"\n")
    if len(content) < SHORT:
        return len(content), len(text.split()), lines
    if not text.isascii() and any(blank in text for blank in _BLANKS[10:]):
        return len(content), len(text.split()), lines
    blank = np.frombuffer(content.translate(_IS_BLANK), dtype=np.bool_)
    begins = int(np.count_nonzero(blank[:-1] > blank[1:])) + (len(blank) > 0 and not blank[0])
    return len(content), begins, lines
