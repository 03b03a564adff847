"""Tokenizers: text to ids and back, each known by the hash of its file."""

import hashlib
from array import array
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import sentencepiece

from ecp_scale.data.files import sha256_of
from ecp_scale.errors import InputError

Ids: TypeAlias = npt.NDArray[np.int32]
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Pieces that end a document, by the name that a Hugging Face tokenizer gives them; the first that it has is taken."""


class Tokenizer(Protocol):
    """What every kind can do."""

    kind: str
    path: Path | None
    """The file that it was made from; None for a kind without one."""
    sha256: str
    end_of_document: int

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The same for many texts, in this thread."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


class SentencePieceTokenizer:
    """A sentencepiece model; its end-of-sentence piece ends a document."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        """Load a model.

        Raises:
            InputError: if the file is missing, is no sentencepiece model, or has no end-of-sentence piece.
        """
        self.path: Path | None = path
        self.sha256 = sha256_of(path)
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

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The same for many texts, in this thread."""
        return self._processor.encode(texts, return_type="numpy", num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._processor.decode(ids)


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's ``tokenizers``, from a file or from the hub."""

    kind = "hf"

    def __init__(self, path: Path) -> None:
        """Load a tokenizer.json.

        Raises:
            InputError: if the file is no tokenizer.json, the library is missing, or nothing ends a document.
        """
        tokenizers = _tokenizers(self.kind)
        self.path: Path | None = path
        self.sha256 = sha256_of(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            raise InputError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
        self._finish()

    def _finish(self) -> None:
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ends = [self._tokenizer.token_to_id(piece) for piece in ENDS]
        known = [end for end in ends if end is not None]
        if not known:
            raise InputError(f"tokenizer {self.path}: has none of {', '.join(ENDS)} to end documents with")
        self.end_of_document: int = known[0]
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        """Ids from 0 to the largest; some may have no piece."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The same for many texts; in this thread where TOKENIZERS_PARALLELISM is false."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        # array() of a list takes half the time of NumPy's.
        return [np.frombuffer(array("i", text.ids), dtype=np.int32) for text in encoded]

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class WordPieceTokenizer(HuggingFaceTokenizer):
    """BERT's WordPiece with a vocab.txt, cased if the vocabulary is; [SEP] ends a document."""

    kind = "wordpiece"

    def __init__(self, path: Path) -> None:
        """Load a vocabulary, one piece per line.

        Raises:
            InputError: if it lacks [UNK] or [SEP], or the library is missing.
        """
        tokenizers = _tokenizers(self.kind)
        self.path = path
        self.sha256 = sha256_of(path)
        try:
            pieces = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"tokenizer {path}: not valid UTF-8 at byte {error.start}") from error
        missing = [piece for piece in ("[UNK]", "[SEP]") if piece not in pieces]
        if missing:
            raise InputError(f"tokenizer {path}: not a WordPiece vocabulary, {' and '.join(missing)} missing")
        lowercase = not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
        self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self._tokenizer.decoder = tokenizers.decoders.WordPiece()
        self._tokenizer.add_special_tokens([piece for piece in pieces if piece in ("[UNK]", "[SEP]", "[CLS]", "[PAD]")])
        self._finish()


class ByteTokenizer:
    """UTF-8 bytes as they are, and id 256 that ends a document."""

    kind = "byte"
    path: Path | None = None
    sha256 = hashlib.sha256(b"byte").hexdigest()
    end_of_document = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The same for many texts."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; what is no UTF-8 shows as a replacement character."""
        return bytes(number for number in ids if number < 256).decode(errors="replace")


KINDS: dict[str, Any] = {
    kind.kind: kind for kind in (SentencePieceTokenizer, HuggingFaceTokenizer, WordPieceTokenizer, ByteTokenizer)
}


def load_tokenizer(spec: str) -> Tokenizer:
    """Load ``sentencepiece:FILE``, ``hf:FILE_OR_NAME``, ``wordpiece:VOCAB.txt`` or ``byte``.

    Raises:
        InputError: if the kind is unknown or the file is not of that kind.
    """
    kind, _, name = spec.partition(":")
    if kind == ByteTokenizer.kind and not name:
        return ByteTokenizer()
    if kind not in KINDS or kind == ByteTokenizer.kind or not name:
        raise InputError(f"tokenizer {spec!r}: expected sentencepiece:FILE, hf:FILE_OR_NAME, wordpiece:FILE or byte")
    path = Path(name)
    if kind == HuggingFaceTokenizer.kind and not path.exists():
        path = _from_hub(name)
    return KINDS[kind](path)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError(f"tokenizer hf:{name}: no such file, and names need pip install 'ecp-scale[data]'") from error
    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # Network, permission, name: the library's own types, all with a clear text.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"tokenizer hf:{name}: no such file, and not found on the hub ({reason})") from error


def _tokenizers(kind: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(f"tokenizer {kind}: needs `tokenizers`: pip install 'ecp-scale[data]'") from error
    return tokenizers
