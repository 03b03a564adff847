"""Tokenizers: text to ids and back, known by the hash of their file."""

from pathlib import Path

import sentencepiece

from ecp_scale.data.files import sha256_of
from ecp_scale.errors import InputError


class SentencePieceTokenizer:
    """A sentencepiece model; its end-of-sentence piece ends a document."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        """Load a model.

        Raises:
            InputError: if the file is missing, is no sentencepiece model, or has no end-of-sentence piece.
        """
        self.path = Path(path)
        self.sha256 = sha256_of(self.path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"tokenizer {path}: not a sentencepiece model ({error})") from error
        self.end_of_document: int = self._processor.eos_id()
        if self.end_of_document < 0:
            raise InputError(f"tokenizer {path}: has no end-of-sentence piece to end documents with")

    @property
    def vocab_size(self) -> int:
        """Number of entries."""
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._processor.decode(ids)


def load_tokenizer(spec: str) -> SentencePieceTokenizer:
    """Load ``sentencepiece:FILE``.

    Raises:
        InputError: if the kind is unknown or the file is not of that kind.
    """
    kind, colon, path = spec.partition(":")
    if not colon or kind != SentencePieceTokenizer.kind or not path:
        raise InputError(f"tokenizer {spec!r}: expected sentencepiece:FILE")
    return SentencePieceTokenizer(path)
