"""The kinds of tokenizers. What all of them can do says ``ecp_scale.data.tokenizer.Tokenizer``.

Text never encodes to a control token: ``</s>`` in a text is four characters, not the end of a document. Only
``encode_batch(..., control=True)`` lets it, for the release recipe, whose texts are written with control tokens.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import sentencepiece

from ecp_scale.data.end_tokens import End, choose_end
from ecp_scale.errors import InputError
from ecp_scale.files import sha256_of

Ids: TypeAlias = npt.NDArray[np.int32]
SPACE_SYMBOL = "\u2581"
"""The character that sentencepiece writes for a space, and therefore reads back as one."""


class UnencodableError(ValueError):
    """A text that has no ids; the message says why, the caller knows which text."""


class SentencePieceTokenizer:
    """A sentencepiece model; its end-of-sentence piece ends a document."""

    kind = "sentencepiece"

    def __init__(self, path: Path, end_token: str | int | None = None) -> None:
        """Load a model.

        Raises:
            InputError: if the file is missing, is no sentencepiece model, or has no such piece to end documents with.
        """
        self.path: Path | None = path
        self.sha256 = sha256_of(path)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"tokenizer {path}: not a sentencepiece model ({error})") from error
        unknown = self.processor.unk_id()
        self.end_of_document, self.end_reason = self._end(end_token, unknown)
        bytes_of_symbol = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        # With all bytes as entries nothing is unknown, and the space symbol can be written as what it is.
        falls_back = all(self.processor.is_byte(piece) for piece in bytes_of_symbol)
        self.unknown: int | None = None if falls_back else unknown
        keeps_front = self.processor.encode("a", out_type=str)[0] == "a"
        self._symbol = np.array(bytes_of_symbol, dtype=np.int32) if falls_back and keeps_front else None
        # A BPE model has the rank of a merge for a score, a Unigram a logarithm.
        self.is_local = all(self.processor.get_score(piece).is_integer() for piece in range(self.vocab_size))

    def _end(self, name: str | int | None, unknown: int) -> End:
        if isinstance(name, int):
            return End(name, f"id {name}, by the record of the shards")
        if name is None:
            if self.processor.eos_id() < 0:
                raise InputError(
                    f"tokenizer {self.path}: has no end-of-sentence piece to end documents with; name a piece with "
                    "--end-token"
                )
            return End(self.processor.eos_id(), f"{self.processor.id_to_piece(self.processor.eos_id())}, by the model")
        token = self.processor.piece_to_id(name)
        if token == unknown:
            raise InputError(f"tokenizer {self.path}: has no entry {name!r} to end documents with")
        return End(token, f"{name}, by --end-token")

    @property
    def vocab_size(self) -> int:
        """Number of entries."""
        return self.processor.get_piece_size()

    def entries(self) -> Iterator[str]:
        """The text of every entry."""
        pieces = (self.processor.id_to_piece(number) for number in range(self.vocab_size))
        return (piece.replace(SPACE_SYMBOL, " ") for piece in pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], control: bool = False) -> list[Ids]:
        """Ids of many texts, in this thread; ``control`` changes nothing, pieces of control have no text."""
        encode = self.processor.encode
        # Trap: a list starts a thread, which takes as long as ten short texts.
        encoded: list[Ids] = (
            [encode(text, return_type="numpy") for text in texts]
            if len(texts) < 8
            else encode(list(texts), return_type="numpy", num_threads=1)
        )
        if self._symbol is not None:
            for number, text in enumerate(texts):
                if SPACE_SYMBOL in text:
                    encoded[number] = self._with_symbols(text)
        if not self.processor.is_control(self.end_of_document):
            names = {self.end_of_document: self.processor.id_to_piece(self.end_of_document)}
            plain = self.processor.encode if self._symbol is None else self._with_symbols
            _keep_out(names, self.vocab_size, texts, encoded, plain)
        return encoded

    def _with_symbols(self, text: str) -> Ids:
        """Ids of a text in which the symbol of a space stands for itself."""
        assert self._symbol is not None
        parts = self.processor.encode(text.split(SPACE_SYMBOL), return_type="numpy", num_threads=1)
        return np.concatenate([part for ids in parts for part in (self._symbol, ids)][1:], dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self.processor.decode(ids)


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's ``tokenizers``, from a file or from the hub."""

    kind = "hf"
    path: Path | None

    def __init__(self, path: Path, end_token: str | int | None = None) -> None:
        """Load a tokenizer.json.

        Raises:
            InputError: if the file is no tokenizer.json, the library is missing, or nothing ends a document.
        """
        tokenizers = _tokenizers(self.kind)
        self.sha256 = sha256_of(path)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            raise InputError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
        self._finish(path, tokenizer, end_token)

    def _finish(self, path: Path, tokenizer: Any, end_token: str | int | None) -> None:
        self.path = path
        self.backend = tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        special = [token.content for _, token in sorted(added.items()) if token.special]
        self.end_of_document, self.end_reason = choose_end(path, vocabulary, special, end_token)
        self.vocab_size = 1 + max(vocabulary.values())
        """Ids from 0 to the largest; some may have no piece."""
        model = json.loads(self.backend.to_str())["model"]
        self.is_local = model["type"] != "Unigram"
        by_name = vocabulary.get(model.get("unk_token") or "")
        self.unknown: int | None = by_name if by_name is not None else model.get("unk_id")
        names = {vocabulary[name]: name for name in special}
        names[self.end_of_document] = next(
            name for name, number in vocabulary.items() if number == self.end_of_document
        )
        self._names = {number: name for number, name in names.items() if number != self.unknown}
        # Of some the unknown token also ends a document.
        self.control_names = frozenset(names.values())
        """What a text names its control tokens by."""

    def entries(self) -> Iterator[str]:
        """The text of every entry."""
        return (self.decode([number]) for number in self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], control: bool = False) -> list[Ids]:
        """Ids of many texts; in this thread where TOKENIZERS_PARALLELISM is false."""
        self.backend.encode_special_tokens = not control  # i.e. encode their names as text
        encoded = [self._plain(text) for text in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if not control:
            # A Unigram or WordLevel model may find the name of a control token among its pieces.
            _keep_out(self._names, self.vocab_size, texts, encoded, self._encode_part)
        return encoded

    def _encode_part(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    @staticmethod
    def _plain(encoded: Any) -> Ids:
        # array() of a list takes half the time of NumPy's.
        return np.frombuffer(array("i", encoded.ids), dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self.backend.decode(ids, skip_special_tokens=False)


class WordPieceTokenizer(HuggingFaceTokenizer):
    """BERT's WordPiece with a vocab.txt, cased if the vocabulary is; [SEP] ends a document."""

    kind = "wordpiece"

    def __init__(self, path: Path, end_token: str | int | None = None) -> None:
        r"""Load a vocabulary, one piece per line; a line ends at "\\n" and nowhere else.

        Raises:
            InputError: if it lacks [UNK] or [SEP], or the library is missing.
        """
        tokenizers = _tokenizers(self.kind)
        self.sha256 = sha256_of(path)
        try:
            pieces = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"tokenizer {path}: not valid UTF-8 at byte {error.start}") from error
        # Trap: read_text() and splitlines() cut at U+2028 and U+0085 too, which bert-base-chinese has as pieces.
        pieces = [piece.removesuffix("\r") for piece in pieces]
        missing = [piece for piece in ("[UNK]", "[SEP]") if piece not in pieces]
        if missing:
            raise InputError(f"tokenizer {path}: not a WordPiece vocabulary, {' and '.join(missing)} missing")
        lowercase = not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        control = ("[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]")
        tokenizer.add_special_tokens([piece for piece in pieces if piece in control])
        self._finish(path, tokenizer, "[SEP]" if end_token is None else end_token)
        if end_token is None:
            self.end_reason = "[SEP], of WordPiece"


class ByteTokenizer:
    """UTF-8 bytes as they are, and id 256 that ends a document."""

    kind = "byte"
    path: Path | None = None
    sha256 = hashlib.sha256(b"byte").hexdigest()
    end_of_document = 256
    end_reason = "id 256, of bytes"
    unknown: int | None = None
    vocab_size = 257
    is_local = True

    def entries(self) -> Iterator[str]:
        """The text of every entry: none has more than a character."""
        return iter(())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], control: bool = False) -> list[Ids]:
        """Ids of many texts; ``control`` changes nothing, the end has no text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; what is no UTF-8 shows as a replacement character."""
        return bytes(number for number in ids if number < 256).decode(errors="replace")


def _keep_out(
    control: dict[int, str],
    vocab_size: int,
    texts: Sequence[str],
    encoded: list[Ids],
    encode: Callable[[str], Sequence[int] | Ids],
) -> None:
    """Encode again, in parts, every text whose ids hold a control token: its name is cut behind the first character.

    Raises:
        UnencodableError: if a control token stays.
    """
    is_control = np.zeros(vocab_size, dtype=np.bool_)
    is_control[list(control)] = True
    for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if not is_control[ids].any():
            continue
        names = sorted((name for name in control.values() if len(name) > 1), key=len, reverse=True)
        border = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names)
        again = [
            token
            for part in (re.split(border, text, flags=re.IGNORECASE) if border else [text])
            for token in encode(part)
        ]
        if is_control[again].any():
            raise UnencodableError("its ids hold a control token of the tokenizer")
        encoded[number] = np.array(again, dtype=np.int32)


def _tokenizers(kind: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(f"tokenizer {kind}: needs `tokenizers`: pip install 'ecp-scale[data]'") from error
    return tokenizers
