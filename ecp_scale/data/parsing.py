"""From a raw record to the text of one document: decoding, the text column, filters, and the recipes' preparations."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from ecp_scale.data.sources import Raw, Reading, TextUnit

Preparation = Literal["none", "wikitext-release"]


class BadRecordError(ValueError):
    """A record that no document can be made of; the message says why, the caller knows where."""


@dataclass(frozen=True)
class Parsing:
    """How a document is made of a record. It travels to the worker processes."""

    text_key: str = "text"
    text_unit: TextUnit = "file"
    where: tuple[tuple[str, str], ...] = ()
    """Columns and the value that each must have, as text."""
    min_characters: int = 1
    max_characters: int | None = None
    share: tuple[float, float] = (0.0, 1.0)
    """Documents whose hash, as a number from 0 to 1, lies from the first on and below the second."""
    preparation: Preparation = "none"

    @property
    def reading(self) -> Reading:
        """What the readers must know of it."""
        return Reading(self.text_unit, (self.text_key, *(column for column, _ in self.where)))

    def text(self, raw: Raw, is_json: bool) -> str | None:
        """The document of a record; None where a filter drops it or it has no text.

        Raises:
            BadRecordError: if the record is damaged or lacks a column.
        """
        if isinstance(raw, bytes) and not is_json:
            text = self._prepared(_decoded(raw))
        else:
            row = _json_object(raw) if isinstance(raw, bytes) else raw
            if any(_as_text(self._column(row, column)) != value for column, value in self.where):
                return None
            found = self._column(row, self.text_key)
            if found is None:
                return None
            if not isinstance(found, str):
                raise BadRecordError(f"{self.text_key!r} is {type(found).__name__}, expected text")
            text = self._prepared(found)
        if not text.strip() or len(text) < self.min_characters:
            return None
        if self.max_characters is not None and len(text) > self.max_characters:
            return None
        return text if self._is_in_share(text) else None

    def _is_in_share(self, text: str) -> bool:
        return self.share == (0.0, 1.0) or self.share[0] <= hash_fraction(text) < self.share[1]

    def _column(self, row: dict[str, Any], name: str) -> Any:
        if name not in row:
            raise BadRecordError(f"no key {name!r}")
        return row[name]

    def _prepared(self, text: str) -> str:
        if self.preparation == "none":
            return text
        # The release strips each line, ends it with [SEP] and joins all of them.
        lines = (line.strip().replace("<unk>", "[UNK]") for line in text.split("\n"))
        return "".join(f"{line}[SEP]" for line in lines)


def hash_fraction(text: str, seed: str = "") -> float:
    """A number from 0 to 1 by which a text is sampled: the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256((seed + text).encode()).digest()[:8]) / 2**64


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not valid UTF-8 at byte {error.start}") from error


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(_decoded(raw))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecordError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadRecordError(f"not a JSON object but {type(row).__name__}")
    return row


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
