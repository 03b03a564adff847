"""Long texts in pieces whose ids, joined, are those of the whole: memory of a piece, not of the text.

A piece ends where the tokenizer cannot merge across: at a border (a space between words, a line end, a tab, East Asian
punctuation) that no entry of the vocabulary spans, and there only if the neighbourhood has the same ids in one piece
and in two. A text without such a place gives one piece.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.data.tokenizer_kinds import UnencodableError
from ecp_scale.preparation.segments import Segments

PIECE_CHARACTERS = 1 << 18
"""Characters of a piece. A tokenizer takes up to 90 bytes of memory for each."""
FAST_CHARACTERS = 1 << 14
"""Characters of a piece where pieces are for speed: byte-pair merges take twice as long outside the cache."""
NEIGHBOURHOOD = 64
"""Characters on both sides of a cut that are tried."""
LINE_END = re.compile(r"(?<=\n)")
BORDERS = (
    (r"(?<=\S)(?= \w)", r"\S "),
    (r"(?<=\n)(?=\w)", r"\n\w"),
    (r"(?<=\t)(?=\w)", r"\t\w"),
    ("(?<=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])(?=\\w)", "[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]\\w"),
)
"""Places where a text may be cut, and what an entry that spans one holds."""


class Piece(NamedTuple):
    """A piece of a text, and how many characters of its beginning are not encoded, since the cut stands for them.

    ``last``: it ends the text. ``segments``: what of it has a loss, where that is not all.
    """

    text: str
    skipped: int = 0
    last: bool = True
    segments: Segments | None = None

    @property
    def encoded(self) -> str:
        """What the tokenizer is given."""
        return self.text[self.skipped :]


class Cutter:
    """Cuts texts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, lines: bool = False, characters: int = PIECE_CHARACTERS) -> None:
        """Prepare to cut.

        Args:
            tokenizer: what the pieces are encoded with.
            lines: cut behind line ends instead, for a preparation that ends each line with a control token.
            characters: of a piece, about.
        """
        self._tokenizer = tokenizer
        self._lines = lines
        self.characters = characters

    @cached_property
    def _border(self) -> re.Pattern[str] | None:
        """Where this tokenizer's texts may be cut; None where nowhere."""
        if self._lines:
            return LINE_END
        spanning = re.compile("|".join(f"({spanned})" for _, spanned in BORDERS))
        spanned = {match.lastindex for entry in self._tokenizer.entries() for match in spanning.finditer(entry)}
        usable = [border for number, (border, _) in enumerate(BORDERS, start=1) if number not in spanned]
        return re.compile("|".join(usable)) if usable else None

    def pieces(self, parts: Iterable[str]) -> Iterator[Piece]:
        """Pieces of a text that comes in parts; at least one."""
        waiting, searched = "", self.characters
        skipped = 0
        for part in parts:
            waiting += part
            while len(waiting) >= searched + NEIGHBOURHOOD:
                cut = self._cut(waiting, searched)
                if cut is None:
                    searched = len(waiting) - NEIGHBOURHOOD  # what was searched once has no cut
                    break
                place, next_skipped = cut
                yield Piece(waiting[:place], skipped, last=False)
                waiting, skipped, searched = waiting[place:], next_skipped, self.characters
        yield Piece(waiting, skipped)

    def _cut(self, text: str, start: int) -> tuple[int, int] | None:
        """The first place from ``start`` on where a text may be cut, and what the next piece skips."""
        if self._border is None:
            return None
        for found in self._border.finditer(text, start, len(text) - NEIGHBOURHOOD):
            skipped = 0 if self._lines else self._skipped(text, found.start())
            if skipped is not None:
                return found.start(), skipped
        return None

    def _skipped(self, text: str, place: int) -> int | None:
        """Characters that must not be encoded behind a cut: 0, 1 where a piece begins with a space of its own."""
        encode = self._tokenizer.encode
        left, right = text[place - NEIGHBOURHOOD : place], text[place : place + NEIGHBOURHOOD]
        try:
            whole, before = encode(left + right), encode(left)
            may_skip = (0, 1) if right[0] == " " else (0,)
            return next((skipped for skipped in may_skip if before + encode(right[skipped:]) == whole), None)
        except UnencodableError:
            return None  # which the encoding of the piece will meet and name
