"""What a set of shards is: PREFIX.manifest.json."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ecp_scale.data.marks import MARKED
from ecp_scale.data.shards import token_type
from ecp_scale.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from ecp_scale.errors import InputError
from ecp_scale.files import sha256_of, write_text

FORMAT_VERSION = 3
EXTENDED = 4
"""Version of shards that mark tokens, or whose documents are windows: what reads version 3 alone would misread them."""
READABLE = (2, FORMAT_VERSION, EXTENDED)
"""Version 2 does not count line ends and unknown tokens, nor say by which filter records were dropped."""
NAMED_AT_MOST = 100
"""Bad records that a manifest names; all are counted."""


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer of the shards; ``file`` is a copy beside them, empty for a kind without a file."""

    kind: str
    file: str
    sha256: str
    vocab_size: int
    end_of_document: int
    gives_texts_back: bool | None = None
    """Whether decoding returns the text; None where it was not tried."""

    def load(self, folder: Path, owner: str) -> Tokenizer:
        """Load the tokenizer that lies in ``folder``; ``owner`` says in an error what was made with it.

        Raises:
            InputError: if it is missing or is another one.
        """
        if self.kind == ByteTokenizer.kind:
            return ByteTokenizer()
        path = folder / self.file
        found = sha256_of(path)
        if found != self.sha256:
            raise InputError(f"tokenizer {path} has sha256 {found[:12]}..., but {owner} {self.sha256[:12]}...")
        return load_tokenizer(f"{self.kind}:{path}", self.end_of_document)


@dataclass(frozen=True)
class TextCounts:
    """How much text. ``tokens`` include one end-of-document token per document; bytes, words and lines are the text's.

    ``lines`` counts line ends; ``unknown`` the tokens that stand for what the vocabulary cannot write.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    lines: int = 0
    unknown: int = 0

    def __add__(self, other: "TextCounts") -> "TextCounts":
        # Field by field: once per document, dataclasses.asdict would be a tenth of all work.
        return TextCounts(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.words + other.words,
            self.lines + other.lines,
            self.unknown + other.unknown,
        )

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are unknown."""
        return self.unknown / max(1, self.tokens)


@dataclass(frozen=True)
class ShardRecord:
    """One shard: the name of its .bin and .idx without suffix, their sha256, and its share of the text."""

    name: str
    counts: TextCounts
    sha256: dict[str, str]

    @classmethod
    def of(cls, content: dict[str, Any]) -> "ShardRecord":
        """From the JSON of a manifest."""
        return cls(str(content["name"]), TextCounts(**content["counts"]), dict(content["sha256"]))


@dataclass(frozen=True)
class SourceRecord:
    """One input as it was read: bytes and sha256 of its content, decompressed; of a table, of the rows that were read.

    ``fingerprint`` is size and time of change of the file, by which a rerun sees that it need not read it again.
    """

    name: str
    bytes: int
    sha256: str | None = None
    records: int = 0
    fingerprint: str = ""


@dataclass(frozen=True)
class Skipped:
    """Records that gave no document: those that were dropped, by reason, and bad ones, of which some are named."""

    reasons: dict[str, int] = field(default_factory=dict)
    bad: int = 0
    named: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Skipped":
        """From the JSON of a manifest."""
        reasons = content["reasons"] if "reasons" in content else {"by a filter": content["dropped"]}
        return cls(
            {reason: count for reason, count in reasons.items() if count}, content["bad"], tuple(content["named"])
        )

    @property
    def dropped(self) -> int:
        """Records that a filter left out."""
        return sum(self.reasons.values())

    def drop(self, reason: str) -> "Skipped":
        """One more record dropped."""
        return dataclasses.replace(self, reasons={**self.reasons, reason: self.reasons.get(reason, 0) + 1})

    def refuse(self, reason: str) -> "Skipped":
        """One more bad record."""
        return dataclasses.replace(self, bad=self.bad + 1, named=(*self.named, reason)[:NAMED_AT_MOST])

    def __add__(self, other: "Skipped") -> "Skipped":
        named = (*self.named, *other.named)[:NAMED_AT_MOST]
        reasons = {
            key: self.reasons.get(key, 0) + other.reasons.get(key, 0) for key in {**self.reasons, **other.reasons}
        }
        return Skipped(reasons, self.bad + other.bad, named)

    def __str__(self) -> str:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
        return f"{self.dropped:,} records dropped{f' ({reasons})' if reasons else ''}, {self.bad:,} bad"


@dataclass(frozen=True)
class Manifest:
    """Everything about a corpus but its tokens. ``settings`` are those of the run that decide what the shards hold."""

    tokenizer: TokenizerRecord
    shards: tuple[ShardRecord, ...]
    totals: TextCounts
    sources: tuple[SourceRecord, ...] = ()
    skipped: Skipped = field(default_factory=Skipped)
    settings: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, Any] = field(default_factory=dict)
    """What lies in the input folders and was not read: by reason how many files, and the first of them."""
    marked: bool = False
    """Whether tokens without a loss are marked, see ``ecp_scale.data.marks``."""
    labels: tuple[str, ...] = ()
    """Names of the labels where every document is a window, whose last token is the number of its label."""

    @property
    def dtype(self) -> type[np.generic]:
        """Type of the stored ids."""
        return MARKED if self.marked else token_type(self.tokenizer.vocab_size)

    @property
    def digest(self) -> str:
        """Hash of the hashes of all shards: two corpora with the same one hold the same tokens in the same order."""
        hashes = [record.sha256["bin"] for record in self.shards]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def write(self, prefix: Path) -> None:
        """Write PREFIX.manifest.json."""
        content = {
            "format_version": EXTENDED if self.marked or self.labels else FORMAT_VERSION,
            **dataclasses.asdict(self),
        }
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
            if content["format_version"] not in READABLE:
                raise InputError(f"{path}: format version {content['format_version']}, expected one of {READABLE}")
            return cls(
                TokenizerRecord(**content["tokenizer"]),
                tuple(ShardRecord.of(item) for item in content["shards"]),
                TextCounts(**content["totals"]),
                tuple(SourceRecord(**item) for item in content["sources"]),
                Skipped.of(content["skipped"]),
                dict(content["settings"]),
                dict(content.get("unread", {})),
                content.get("marked", False),
                tuple(content.get("labels", ())),
            )
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; {_instead(prefix)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a manifest of token shards ({type(error).__name__}: {error})") from error

    def load_tokenizer(self, prefix: Path) -> Tokenizer:
        """Load the tokenizer that lies beside the shards.

        Raises:
            InputError: if it is missing or is not the one that made the shards.
        """
        return self.tokenizer.load(prefix.parent, f"the shards of {manifest_path(prefix).name} were made with")


def unread_lines(unread: dict[str, Any]) -> list[str]:
    """``Manifest.unread`` as text, a line for each reason."""
    return [
        f"{left['files']:,} {reason} ({', '.join(left['named'][:3])}{', ...' if left['files'] > 3 else ''})"
        for reason, left in unread.items()
    ]


def manifest_path(prefix: Path) -> Path:
    """Where the manifest of a prefix lies.

    Raises:
        InputError: if the prefix has no name, as a folder's root has none.
    """
    if not prefix.name:
        raise InputError(f"prefix {str(prefix)!r} is a folder, expected a folder and the beginning of a file name")
    return prefix.with_name(prefix.name + ".manifest.json")


def _instead(prefix: Path) -> str:
    if prefix.with_name(prefix.name + ".unfinished.jsonl").exists():
        return "preprocessing of this prefix is not finished"
    if manifest_path(prefix.with_name(prefix.name + "-train")).exists():
        return f"{prefix}-train and {prefix}-validation are there"
    return "expected the prefix of preprocessed shards"
