"""Our tokenizers as Hugging Face's ``tokenizer.json``: the same ids for every text."""

import json
from typing import Any

from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.data.tokenizer_kinds import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer

END_OF_BYTES = "<|endoftext|>"
"""Name of the id that ends documents of bytes, which has no text."""


def name_of_end(tokenizer: Tokenizer) -> str:
    """The entry that ends a document."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.processor.id_to_piece(tokenizer.end_of_document)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.backend.id_to_token(tokenizer.end_of_document)
    return END_OF_BYTES


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Content of the file; None for a sentencepiece model, which has no exact equal."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        # What it would put before and behind a text was not there in training.
        content: dict[str, Any] = {**json.loads(tokenizer.backend.to_str()), "post_processor": None}
        name = name_of_end(tokenizer)
        if name not in [token["content"] for token in content["added_tokens"]]:
            content["added_tokens"].append(_special(tokenizer.end_of_document, name))
        return content
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes()
    return None


def control_in_text(tokenizer: Tokenizer) -> str | None:
    """Name of a control token that the library makes of its text: a Unigram or WordLevel model may have it as a piece.

    Our own encoding cuts such a name in two.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    backend = tokenizer.backend
    backend.encode_special_tokens = True  # i.e. encode their names as text
    special = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    for token in special:
        number = backend.token_to_id(token.content)
        if number != tokenizer.unknown and number in backend.encode(token.content, add_special_tokens=False).ids:
            return str(token.content)
    return None


def _special(number: int, name: str) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, "special": True, **plain}


def _of_bytes() -> dict[str, Any]:
    """Characters that stand for bytes, as GPT-2's tokenizer has them, and no merges."""
    by_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(ByteTokenizer.end_of_document, END_OF_BYTES)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **by_level},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **by_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_characters())},
            "merges": [],
        },
    }


def _characters() -> list[str]:
    """The character of each byte: itself where it prints in Latin-1, else the next one from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]
