"""Train a sentencepiece tokenizer that gives every text back exactly."""

import heapq
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from ecp_scale.errors import InputError
from ecp_scale.files import atomic_write
from ecp_scale.preparation.documents import read_parts
from ecp_scale.preparation.finding import find_sources
from ecp_scale.preparation.parsing import Parsing, hash_fraction

MAX_LINE_BYTES = 4096
"""Sentencepiece leaves out longer lines without a word, so they are cut."""
REFUSED = "\u2585"
"""Sentencepiece's own symbol of an unknown piece: lines that hold it are left out too, so they are cut there."""


@dataclass
class Used:
    """Bytes of the text, line ends left out, and how many of them the training saw."""

    text: int = 0
    used: int = 0
    error: InputError | None = None
    """What ended the text; the trainer would hide it."""


def train_tokenizer(
    inputs: Sequence[str],
    output: str,
    vocab_size: int,
    *,
    parsing: Parsing | None = None,
    threads: int = 1,
    sample_bytes: int | None = None,
    seed: int = 1,
) -> Used:
    """Train byte-pair encoding with byte fallback on any text and write OUTPUT (a .model file).

    No normalisation, all white space kept, line ends and tabs pieces of their own, unknown characters as bytes:
    decoding what was encoded returns the text. ``sample_bytes`` keeps that many bytes of lines, drawn by ``seed`` from
    all of the text in one pass, and in memory; None keeps all.

    Raises:
        InputError: if an input or the output cannot be used, or the text is too small for the vocabulary.
    """
    sources = find_sources(inputs).sources
    used = Used()
    model = io.BytesIO()
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"--output {path} is a folder, expected a .model file")
        with atomic_write(path) as file:  # first of all: a place that cannot be written is noticed now
            lines = _counted(_lines(read_parts(sources, parsing or Parsing())), used)
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines if sample_bytes is None else _sample(lines, used, sample_bytes, seed),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.9999,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n", "\t"],
                max_sentence_length=MAX_LINE_BYTES,
                num_threads=threads,
                minloglevel=2,
            )
            file.write(model.getvalue())
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error
    except RuntimeError as error:
        if used.error is not None:
            raise used.error from None
        if not used.text:
            raise InputError(f"the corpus is empty: no text in {', '.join(inputs)}") from error
        reason = str(error).strip().splitlines()[-1]
        if "required_chars" in reason:
            reason = "too small for the 256 bytes and the characters of the text"
        elif most := re.search(r"<= (\d+)", reason):
            reason = f"the text allows {int(most[1]):,} entries at most"
        raise InputError(f"cannot train a vocabulary of {vocab_size} on {', '.join(inputs)}: {reason}") from error
    return used


def _counted(lines: Iterable[str], used: Used) -> Iterator[str]:
    try:
        for line in lines:
            size = len(line.encode())
            used.text += size
            used.used += size
            yield line
    except InputError as error:
        used.error = error
        raise


def _sample(lines: Iterable[str], used: Used, most: int, seed: int) -> Iterator[str]:
    """Lines with the smallest hashes of their numbers, as many as make up ``most`` bytes, in order."""
    kept: list[tuple[float, int, str]] = []
    size = 0
    for number, line in enumerate(lines):
        heapq.heappush(kept, (-hash_fraction(str(number), f"{seed}/"), number, line))
        size += len(line.encode())
        while size > most and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    used.used = size
    yield from (line for _, _, line in sorted(kept, key=lambda entry: entry[1]))


def _lines(parts: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """Lines of documents that come in parts, long ones cut, blank ones left out."""
    rest = ""
    for text, last in parts:
        *whole, rest = (rest + text).split("\n")
        if last:
            whole, rest = [*whole, rest], ""
        elif len(rest) > 2 * MAX_LINE_BYTES:
            *cut, rest = list(_cut(rest)) or [""]
            whole += cut
        yield from itertools.chain.from_iterable(map(_cut, filter(None, whole)))


def _cut(line: str) -> Iterator[str]:
    """Pieces of at most ``MAX_LINE_BYTES``, between words where there are any, without what the trainer refuses."""
    for part in line.split(REFUSED):
        content, start = part.encode(), 0
        while len(content) - start > MAX_LINE_BYTES:
            piece = content[start : start + MAX_LINE_BYTES].decode(errors="ignore")
            blank = piece.rfind(" ")
            piece = piece[:blank] if blank > 0 else piece
            yield piece
            start += len(piece.encode())
        if start < len(content):
            yield content[start:].decode()
