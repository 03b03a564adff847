"""What tests of preprocessing write and read back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecp_scale.data.manifest import Manifest
from ecp_scale.data.shards import TokenShard


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    """Documents as .jsonl."""
    path.write_text("".join(json.dumps({"text": text, "length": len(text)}) + "\n" for text in documents))
    return path


def stored(prefix: Path) -> list[list[int]]:
    """Documents of the shards, in order."""
    shards = [TokenShard(prefix.parent / record.name) for record in Manifest.read(prefix).shards]
    return [shard.document(number).tolist() for shard in shards for number in range(len(shard.lengths))]


def stored_texts(prefix: Path) -> list[str]:
    """The same as text, of the byte tokenizer."""
    return [bytes(ids[:-1]).decode() for ids in stored(prefix)]


def expected(documents: Sequence[str]) -> list[list[int]]:
    """Documents by the byte tokenizer."""
    return [[*text.encode(), 256] for text in documents]


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder, hidden ones included; a lock holds a process number."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".lock", ".holder")}


def byte_level(path: Path, special: Sequence[str], added: Sequence[str] = (), normalizer: Any = None) -> Path:
    """A tokenizer.json of bytes with some special tokens before them and some plain added ones behind."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(path))
    return path
