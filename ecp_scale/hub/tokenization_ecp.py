"""A sentencepiece model as a tokenizer of Hugging Face's transformers, by the sentencepiece library itself.

A tokenizer.json that is converted from a sentencepiece model normalises some texts otherwise; this one cannot.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE_SYMBOL = "\u2581"
"""The character that sentencepiece writes for a space, and therefore reads back as one."""


class EcpTokenizer(PreTrainedTokenizer):
    """Pieces of a sentencepiece model; text never becomes a control piece."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012, the type that the base class has
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **others: Any) -> None:
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        symbol = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        has_bytes = all(self.processor.is_byte(self.processor.piece_to_id(piece)) for piece in symbol)
        keeps_front = self.processor.encode("a", out_type=str)[0] == "a"
        self.symbol = symbol if has_bytes and keeps_front else None
        super().__init__(**{"split_special_tokens": True, **others})

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.processor.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Pieces and their ids."""
        pieces = {self.processor.id_to_piece(number): number for number in range(self.vocab_size)}
        return {**pieces, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        pieces = self._pieces(text)
        name = str(self.eos_token)
        if len(name) < 2 or name not in pieces:
            return pieces
        # The end of documents may be a piece that text can become: its name is cut behind the first character.
        border = f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})"
        return [piece for part in re.split(border, text, flags=re.IGNORECASE) for piece in self._pieces(part)]

    def _pieces(self, text: str) -> list[str]:
        if self.symbol is None or SPACE_SYMBOL not in text:
            return self.processor.encode(text, out_type=str)
        # The symbol of a space stands for itself, as bytes.
        parts = self.processor.encode(text.split(SPACE_SYMBOL), out_type=str)
        return [piece for pieces in parts for piece in (*self.symbol, *pieces)][len(self.symbol) :]

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self.processor.decode_pieces(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the model."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if target.absolute() != Path(self.vocab_file).absolute():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
