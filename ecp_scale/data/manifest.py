"""What a set of shards is: PREFIX.manifest.json."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ecp_scale.data.files import sha256_of, write_text
from ecp_scale.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from ecp_scale.errors import InputError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer of the shards; ``file`` is a copy beside them."""

    kind: str
    file: str
    sha256: str
    vocab_size: int
    end_of_document: int

    def load(self, folder: Path, owner: str) -> SentencePieceTokenizer:
        """Load the tokenizer that lies in ``folder``; ``owner`` says in an error what was made with it.

        Raises:
            InputError: if it is missing or is another one.
        """
        path = folder / self.file
        found = sha256_of(path)
        if found != self.sha256:
            raise InputError(f"tokenizer {path} has sha256 {found[:12]}..., but {owner} {self.sha256[:12]}...")
        return load_tokenizer(f"{self.kind}:{path}")


@dataclass(frozen=True)
class TextCounts:
    """How much text; ``tokens`` include one end-of-document token per document, ``bytes`` and ``words`` do not."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0

    def __add__(self, other: "TextCounts") -> "TextCounts":
        values = dataclasses.asdict(self)
        return TextCounts(**{name: value + getattr(other, name) for name, value in values.items()})


@dataclass(frozen=True)
class ShardRecord:
    """One shard: the name of its .bin and .idx without suffix, and its share of the text."""

    name: str
    counts: TextCounts


@dataclass(frozen=True)
class Manifest:
    """Everything about a corpus but its tokens."""

    tokenizer: TokenizerRecord
    shards: tuple[ShardRecord, ...]
    totals: TextCounts

    def write(self, prefix: Path) -> None:
        """Write PREFIX.manifest.json."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_text(manifest_path(prefix), json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, prefix: Path) -> "Manifest":
        """Read PREFIX.manifest.json.

        Raises:
            InputError: if it is missing or not of this format.
        """
        path = manifest_path(prefix)
        try:
            content = json.loads(path.read_text())
            if content["format_version"] != FORMAT_VERSION:
                raise InputError(f"{path}: format version {content['format_version']}, expected {FORMAT_VERSION}")
            shards = tuple(ShardRecord(item["name"], TextCounts(**item["counts"])) for item in content["shards"])
            return cls(TokenizerRecord(**content["tokenizer"]), shards, TextCounts(**content["totals"]))
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror or error}; expected the prefix of preprocessed shards"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a manifest of token shards ({type(error).__name__}: {error})") from error

    def load_tokenizer(self, prefix: Path) -> SentencePieceTokenizer:
        """Load the tokenizer that lies beside the shards.

        Raises:
            InputError: if it is missing or is not the one that made the shards.
        """
        return self.tokenizer.load(prefix.parent, f"the shards of {manifest_path(prefix).name} were made with")


def manifest_path(prefix: Path) -> Path:
    """Where the manifest of a prefix lies."""
    return prefix.with_name(prefix.name + ".manifest.json")
