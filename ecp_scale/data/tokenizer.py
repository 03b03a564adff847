"""Tokenizers: text to ids and back, each known by the hash of its file."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ecp_scale.data.end_tokens import DECLARATIONS
from ecp_scale.data.tokenizer_kinds import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Ids,
    SentencePieceTokenizer,
    WordPieceTokenizer,
)
from ecp_scale.errors import InputError

PROBE = "Word  two\n\n\tTHREE\u2581 \u00e9 e\u0301 \ufb01ne\u00a0\u200b\r\n \u6f22\u5b57 \U0001f642 </s> end \n"
"""A text that shows what a tokenizer changes: case, white space, accents, ligatures, rare characters."""


class Tokenizer(Protocol):
    """What every kind can do."""

    kind: str
    path: Path | None
    """The file that it was made from; None for a kind without one."""
    sha256: str
    end_of_document: int
    """Id of the token that ends a document."""
    end_reason: str
    """Name of the token that ends a document, and why it was chosen."""
    unknown: int | None
    """Id that stands for what the vocabulary cannot write; None where there is none."""
    is_local: bool
    """Whether the neighbourhood of a word decides its ids. A Unigram maximizes a sum over the text, whose rounding
    can decide between equals."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def entries(self) -> Iterator[str]:
        """The text of every entry, for those that hold more than one character."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""

    def encode_batch(self, texts: Sequence[str], control: bool = False) -> list[Ids]:
        """Ids of many texts, in this thread; ``control``: names of control tokens in them become the tokens."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


def gives_texts_back(tokenizer: Tokenizer) -> bool:
    """Whether decoding returns what was encoded, tried on a text with all that tokenizers are known to change."""
    return tokenizer.decode(tokenizer.encode(PROBE)) == PROBE


KINDS: dict[str, Any] = {
    kind.kind: kind for kind in (SentencePieceTokenizer, HuggingFaceTokenizer, WordPieceTokenizer, ByteTokenizer)
}


def load_tokenizer(spec: str, end_token: str | int | None = None) -> Tokenizer:
    """Load ``sentencepiece:FILE``, ``hf:FILE_OR_NAME``, ``wordpiece:VOCAB.txt`` or ``byte``.

    Args:
        spec: kind and file.
        end_token: the entry that ends a document, or its id; None takes the tokenizer's own, see ``end_tokens``.

    Raises:
        InputError: if the kind is unknown, the file is not of that kind, or no entry ends a document.
    """
    kind, _, name = spec.partition(":")
    if kind == ByteTokenizer.kind and not name:
        if end_token not in (None, ByteTokenizer.end_of_document):
            raise InputError(f"tokenizer byte has no entry {end_token!r}; its documents end with id 256")
        return ByteTokenizer()
    if kind not in KINDS or kind == ByteTokenizer.kind or not name:
        raise InputError(f"tokenizer {spec!r}: expected sentencepiece:FILE, hf:FILE_OR_NAME, wordpiece:FILE or byte")
    path = Path(os.path.expanduser(name))  # noqa: PTH111, as arguments are
    if kind == HuggingFaceTokenizer.kind and not path.exists() and not name.endswith(".json"):
        path = _from_hub(name)
    return KINDS[kind](path, end_token)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise InputError(f"tokenizer hf:{name}: no such file, and names need pip install 'ecp-scale[data]'") from error
    try:
        for declaration in DECLARATIONS:
            try:
                hf_hub_download(name, declaration)
            except EntryNotFoundError:
                continue
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # Network, permission, name: the library's own types, all with a clear text.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"tokenizer hf:{name}: no such file, and not found on the hub ({reason})") from error
