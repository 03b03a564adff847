"""Documents of text inputs, read and parsed in this process."""

import codecs
import hashlib
from collections.abc import Iterator, Sequence

from ecp_scale.errors import InputError
from ecp_scale.preparation.parsing import EMPTY, VALIDATION, BadRecordError, Dropped, Parsing, digest_fraction
from ecp_scale.preparation.segments import Segments
from ecp_scale.preparation.sources import Place, Source


class LongText:
    """A plain text that passes in parts: decoded, counted and hashed, so that its filters can be asked at its end."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._digest = hashlib.sha256()
        self._validation_digest = hashlib.sha256(VALIDATION.encode())
        self._characters = 0
        self._bytes = 0
        self._has_text = False
        self._dropped: Dropped | None = None

    def decode(self, raw: bytes, last: bool) -> str:
        """Text of the next part; a character that is cut is completed by the next.

        Raises:
            BadRecordError: naming the first byte of the text that is not valid UTF-8.
        """
        kept = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(raw, last)
        except UnicodeDecodeError as error:
            raise BadRecordError(f"not valid UTF-8 at byte {self._bytes - kept + error.start}") from error
        self._bytes += len(raw)
        self._digest.update(raw)
        self._validation_digest.update(raw)
        self._characters += len(text)
        self._has_text = self._has_text or not text.isspace()
        return text

    def drop(self, reason: Dropped) -> None:
        """Leave the text out."""
        self._dropped = reason

    @property
    def fraction(self) -> float:
        """The number from 0 to 1 by which the text is sampled, see ``hash_fraction``."""
        return digest_fraction(self._digest)

    @property
    def validation_fraction(self) -> float:
        """The number from 0 to 1 by which the text is set aside for validation."""
        return digest_fraction(self._validation_digest)

    def dropped(self, parsing: Parsing) -> Dropped | None:
        """Why the text, all of which has passed, is dropped."""
        if self._dropped is not None or not self._bytes:
            return self._dropped or EMPTY
        return parsing.filtered(self._characters, self._has_text) or parsing.share_of(self.fraction)


def read_parts(sources: Sequence[Source], parsing: Parsing) -> Iterator[tuple[str, bool]]:
    """Documents in parts, in order, and whether each part ends a document.

    Only a long plain text has several parts, and no filter drops it.

    Raises:
        InputError: naming the source and the record that cannot be read.
    """
    for number, source in enumerate(sources):
        is_json = source.format(parsing.reading) == "json"
        long = LongText()
        for record in source.records(number, Place(number), parsing.reading):
            if record.what == "end":
                continue
            try:
                if record.part:
                    assert isinstance(record.raw, bytes)
                    yield long.decode(record.raw, record.last), record.last
                    long = LongText() if record.last else long
                    continue
                text = parsing.text(record.raw, is_json)
            except BadRecordError as error:
                raise InputError(f"{record.name}: {error}") from error
            if not isinstance(text, Dropped):
                yield text.text if isinstance(text, Segments) else text, True
