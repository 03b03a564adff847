"""How plain text is cut into documents: files, blocks, lines, or articles of WikiText; and long ones into parts."""

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

TextUnit = Literal["file", "block", "line", "article"]
READ_BYTES = 1 << 20
"""Python's own 8 KiB would cut most documents into several reads."""
PART_BYTES = 1 << 20
"""A plain text that is longer comes in parts of about so many bytes."""
ARTICLE = re.compile(rb" = [^=].* = *\n?")
"""The title line of an article of WikiText; its sections have more signs."""


def texts(file: Any, unit: str) -> Iterator[tuple[bytes, bool, bool]]:
    """All content of an open file, and of each item whether it is a part of a long text and whether it ends a text."""
    waiting: list[bytes] = []
    size, part = 0, False
    for fragment, begins in UNITS[unit](file):
        if waiting and (begins or size >= PART_BYTES):
            part = part or not begins
            yield b"".join(waiting), part, begins
            waiting, size, part = [], 0, part and not begins
        waiting.append(fragment)
        size += len(fragment)
    if waiting:
        yield b"".join(waiting), part, True


def _blocks_of_bytes(file: Any) -> Iterator[tuple[bytes, bool]]:
    while block := file.read(READ_BYTES):
        yield block, False


def _lines(file: Any) -> Iterator[tuple[bytes, bool]]:
    begins = True
    while fragment := file.readline(PART_BYTES):
        yield fragment, begins
        begins = fragment.endswith(b"\n")


def _articles(file: Any) -> Iterator[tuple[bytes, bool]]:
    """Lines; an article begins with its title, and what stands before the first title is one of its own."""
    has_text = False
    for line, begins in _lines(file):
        title = has_text and begins and ARTICLE.fullmatch(line) is not None
        yield line, title
        has_text = has_text or not line.isspace()


def _paragraphs(file: Any) -> Iterator[tuple[bytes, bool]]:
    """Lines; a block begins behind blank ones, which belong to the block before them."""
    has_text = ended = False
    for line, begins in _lines(file):
        blank = begins and line.isspace()
        yield line, ended and not blank
        if ended and not blank:
            ended = False
        has_text = has_text or not blank
        ended = ended or (blank and has_text)


UNITS: dict[str, Callable[[Any], Iterator[tuple[bytes, bool]]]] = {
    "file": _blocks_of_bytes,
    "block": _paragraphs,
    "line": _lines,
    "article": _articles,
}
"""Fragments of an open file, and whether each begins a document, by the unit of a document."""
