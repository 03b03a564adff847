"""Real text that every machine has: sources of Python's standard library."""

import argparse
import ast
import inspect
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ecp_scale.data.corpus import Corpus
from ecp_scale.evaluation.texts import count_tokens
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.preparation.tokenizer_training import train_tokenizer

MODULES: tuple[ModuleType, ...] = (argparse, ast, inspect, json, textwrap)
LONGEST_DOCUMENT = 130_000
"""Characters."""


@dataclass(frozen=True)
class ShardedText:
    """Documents, a tokenizer trained on them, and their shards."""

    folder: Path
    documents: tuple[str, ...]

    @property
    def tokenizer(self) -> Path:
        """The sentencepiece model."""
        return self.folder / "tokenizer.model"

    @property
    def text(self) -> Path:
        """The documents as .jsonl."""
        return self.folder / "text.jsonl"

    @property
    def prefix(self) -> str:
        """Prefix of the shards."""
        return str(self.folder / "shards" / "train")

    def most_frequent_token(self) -> int:
        """Id that occurs most often."""
        return int(count_tokens(Corpus(self.prefix, sequence_length=1)).argmax())


def write_sharded_text(folder: Path, vocab_size: int = 400) -> ShardedText:
    """Write the documents, train a tokenizer on them and shard them, into several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    # Modules grow with every Python; a document must fit into a shard.
    text = ShardedText(folder, tuple(inspect.getsource(module)[:LONGEST_DOCUMENT] for module in MODULES))
    text.text.write_text("".join(json.dumps({"text": document}) + "\n" for document in text.documents))
    train_tokenizer([str(text.text)], str(text.tokenizer), vocab_size)
    preprocess([str(text.text)], f"sentencepiece:{text.tokenizer}", text.prefix, shard_tokens=85_000)
    return text
