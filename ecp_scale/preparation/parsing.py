"""From a raw record to the text of one document: decoding, the text's key, filters, and the recipes' preparations."""

import hashlib
import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from ecp_scale.preparation.segments import ChatError, ChatTemplate, Segments
from ecp_scale.preparation.sources import Raw, Reading, TextUnit
from ecp_scale.preparation.tables import BadRow

Preparation = Literal["none", "wikitext-release"]


class BadRecordError(ValueError):
    """A record that no document can be made of; the message says why, the caller knows where."""


class Dropped(NamedTuple):
    """A record that a filter leaves out, and which."""

    reason: str


EMPTY = Dropped("without text")


@dataclass(frozen=True)
class Parsing:
    """How a document is made of a record. It travels to the worker processes."""

    text_key: str = "text"
    """Key or column of the text; dots lead into objects, as in ``meta.text``."""
    text_unit: TextUnit = "file"
    where: tuple[tuple[str, str], ...] = ()
    """Keys and the value that each must have, as text: a string, number, true, false or null."""
    min_characters: int = 1
    max_characters: int | None = None
    share: tuple[float, float] = (0.0, 1.0)
    """Documents whose hash, as a number from 0 to 1, lies from the first on and below the second."""
    preparation: Preparation = "none"
    stdin: str = ".jsonl"
    """What standard input holds, as the ending of a file would say it."""
    prompt_key: str | None = None
    """Key of a text before that of ``text_key``, whose tokens are marked: they have no loss."""
    chat: ChatTemplate | None = None
    """What writes the conversation under ``text_key``; all but what the assistant says is marked."""

    @property
    def marks(self) -> bool:
        """Whether tokens without a loss are marked."""
        return self.prompt_key is not None or self.chat is not None

    @property
    def reading(self) -> Reading:
        """What the readers must know of it."""
        prompt = () if self.prompt_key is None else (self.prompt_key,)
        return Reading(self.text_unit, (self.text_key, *prompt, *(key for key, _ in self.where)), self.stdin)

    def text(self, raw: Raw, is_json: bool) -> str | Segments | Dropped:
        """The document of a record, in parts where some have no loss, or why there is none.

        Raises:
            BadRecordError: if the record is damaged or lacks the text's key.
        """
        found: str | Segments
        if isinstance(raw, bytes) and not is_json:
            if self.marks and raw:  # the end of a file has nothing
                raise BadRecordError("plain text has no keys, expected records with prompts or conversations")
            found = decoded(raw)
        elif isinstance(raw, BadRow):
            raise BadRecordError(raw.reason)
        else:
            row = _json_object(raw) if isinstance(raw, bytes) else raw
            for key, value in self.where:
                held, is_there = _find(row, key)
                if not is_there or not _matches(held, value):
                    return Dropped(f"by --where {key}={value}" if is_there else f"by --where, no key {key}")
            text = self._of_row(row)
            if text is None:
                return EMPTY
            found = text
        text = found if isinstance(found, str) else found.text
        _check_unicode(text)
        return self.filtered(len(text), bool(text.strip())) or self.in_share(text) or found

    def _of_row(self, row: dict[str, Any]) -> str | Segments | None:
        """What is under the keys; None where it is null."""
        if self.chat is not None:
            messages, is_there = _find(row, self.text_key)
            try:
                if not is_there:
                    raise ChatError(f"no key {self.text_key!r}")
                return None if messages is None else self.chat.segments(messages)
            except ChatError as error:
                raise BadRecordError(str(error)) from error
        text = _text_of(row, self.text_key)
        if self.prompt_key is None or text is None:
            return text
        prompt = _text_of(row, self.prompt_key) or ""
        return Segments(((prompt, False), (text, True)) if prompt else ((text, True),))

    def filtered(self, characters: int, has_text: bool) -> Dropped | None:
        """Why a document of so many characters is dropped."""
        if not has_text:
            return EMPTY
        if characters < self.min_characters:
            return Dropped("by --min-characters")
        if self.max_characters is not None and characters > self.max_characters:
            return Dropped("by --max-characters")
        return None

    def in_share(self, text: str) -> Dropped | None:
        """Why a document is dropped by its hash."""
        return self.share_of(hash_fraction(text)) if self.share != (0.0, 1.0) else None

    def share_of(self, fraction: float) -> Dropped | None:
        """Why a document whose hash is ``fraction`` is dropped."""
        return None if self.share[0] <= fraction < self.share[1] else Dropped("by --share")

    def prepared(self, text: str, last: bool = True) -> str:
        """What the tokenizer is given of a text, or of some lines of one; ``last``: they end it.

        The release strips each line and ends it with [SEP]; of the last line the document's own end does so.
        """
        if self.preparation == "none":
            return text
        lines = (line.strip().replace("<unk>", "[UNK]") for line in text.removesuffix("\n").split("\n"))
        return "[SEP]".join(lines) + ("" if last else "[SEP]")


VALIDATION = "validation/"
"""Seed of the hash by which documents are set aside: --share must not decide it."""


def hash_fraction(text: str, seed: str = "") -> float:
    """A number from 0 to 1 by which a text is sampled: the same on every machine and in every order."""
    return digest_fraction(hashlib.sha256((seed + text).encode()))


def digest_fraction(digest: "hashlib._Hash") -> float:
    """The number from 0 to 1 that the hash of a text stands for."""
    return int.from_bytes(digest.digest()[:8]) / 2**64


def decoded(raw: bytes) -> str:
    """Text of UTF-8.

    Raises:
        BadRecordError: naming the first byte that is none.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = " (it begins as UTF-16 does; convert it with iconv)" if wide else ""
        raise BadRecordError(f"not valid UTF-8 at byte {error.start}{hint}") from error


def _check_unicode(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise BadRecordError(f"no Unicode text: lone surrogate U+{code:04X} at character {error.start}") from error


def _json_object(raw: bytes) -> dict[str, Any]:
    text = decoded(raw)
    try:
        row = _loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not valid JSON ({error}){_HINTS.get(text.strip()[:1], '')}") from error
    if not isinstance(row, dict):
        raise BadRecordError(f"not a JSON object but {type(row).__name__}{_HINTS.get(text.strip()[:1], '')}")
    return row


_HINTS = {
    "[": "; an array? jq -c '.[]' makes a line of each of its objects",
    "{": "; an object over several lines? jq -c . makes one of them",
}


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more digits than int() takes
        return json.loads(text, parse_int=lambda digits: digits)


def _find(row: dict[str, Any], key: str) -> tuple[Any, bool]:
    """Value under a key or a path of keys, and whether it is there."""
    if key in row:
        return row[key], True
    found: Any = row
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return None, False
        found = found[part]
    return found, True


def _text_of(row: dict[str, Any], key: str) -> str | None:
    """Text under a key; None where it is null.

    Raises:
        BadRecordError: if there is none.
    """
    text, is_there = _find(row, key)
    if not is_there:
        raise BadRecordError(f"no key {key!r}")
    if text is not None and not isinstance(text, str):
        inside = f"; name a key inside it: {key}.KEY" if isinstance(text, dict) else ""
        raise BadRecordError(f"{key!r} is {type(text).__name__}, expected text{inside}")
    return text


def _matches(found: Any, wanted: str) -> bool:
    """Whether a value is the one that a condition names: numbers as numbers, true, false and null as JSON has them."""
    if isinstance(found, str):
        return found == wanted
    if found is None or isinstance(found, bool):
        return json.dumps(found) == wanted.lower()
    if isinstance(found, int | float | Decimal):
        try:
            return found == (float(wanted) if isinstance(found, float) else Decimal(wanted))
        except (ValueError, ArithmeticError):
            return False
    return (json.dumps(found, default=str) if isinstance(found, list | dict) else str(found)) == wanted
