"""What a preprocessing run has done: PREFIX.unfinished.jsonl, a line at each shard, until the manifest replaces it."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecp_scale.data.manifest import ShardRecord, Skipped, SourceRecord, TextCounts
from ecp_scale.errors import InputError
from ecp_scale.files import naming, write_text
from ecp_scale.preparation.sources import Place

FORMAT_VERSION = 1
NAMED_DIFFERENCES = 3
"""Sources that a refusal names; it counts all."""


@dataclass(frozen=True)
class Identity:
    """What decides the shards of a run, by which a later one knows its own work.

    The sources are known by name alone: whether their content is the same is found where it was read.
    """

    settings: dict[str, Any]
    sources: tuple[str, ...]

    def check(self, path: Path, before: "Identity") -> None:
        """Refuse a prefix that belongs to another run.

        Raises:
            InputError: saying what differs, in a few lines.
        """
        changed = [key for key in self.settings if before.settings.get(key) != self.settings[key]]
        differences = [f"{key} was {before.settings.get(key)!r} and is now {self.settings[key]!r}" for key in changed]
        if before.sources != self.sources:
            more = [name for name in self.sources if name not in set(before.sources)]
            fewer = [name for name in before.sources if name not in set(self.sources)]
            parts = [_named(more, "more"), _named(fewer, "fewer")]
            differences.append(f"sources: {'; '.join(filter(None, parts)) or 'the same ones in another order'}")
        if differences:
            raise InputError(
                f"{path}: belongs to another run; choose another prefix or remove its files:\n"
                + "\n".join(f"  - {text}" for text in differences[:9])
            )


def _named(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:NAMED_DIFFERENCES])
    return f"{len(names):,} {what} ({shown}{', ...' if len(names) > NAMED_DIFFERENCES else ''})" if names else ""


@dataclass(frozen=True)
class State:
    """How far a run is: everything that the next document depends on, and what is counted on the way.

    ``seen`` is the hash of what was read of the source at ``place``; ``block`` counts the blocks of text that were
    shared out to training and validation.
    """

    place: Place = field(default_factory=Place)
    seen: str | None = None
    skipped: Skipped = field(default_factory=Skipped)
    block: int = 0


@dataclass(frozen=True)
class Journal:
    """What is on disk: per output its finished shards and how much of the next, what was read, and the state behind it.

    ``complete`` says that there is no next shard: only names and manifests are missing. ``block_characters`` is the
    size of the blocks of a run that shares out blocks.
    """

    path: Path
    identity: Identity
    shards: tuple[tuple[ShardRecord, ...], ...]
    begun: tuple[TextCounts, ...]
    read: tuple[SourceRecord, ...] = ()
    state: State = field(default_factory=State)
    complete: bool = False
    block_characters: int | None = None

    @classmethod
    def begin(cls, path: Path, identity: Identity, outputs: int, block_characters: int | None) -> "Journal":
        """Write the journal of a run that has done nothing yet."""
        header = {
            "format_version": FORMAT_VERSION,
            "settings": identity.settings,
            "sources": identity.sources,
            "outputs": outputs,
            "block_characters": block_characters,
        }
        write_text(path, json.dumps(header) + "\n")
        empty = ((),) * outputs, (TextCounts(),) * outputs
        return cls(path, identity, *empty, block_characters=block_characters)

    @classmethod
    def read_from(cls, path: Path) -> "Journal":
        """Read a journal; a last line that a crash has cut is as if it had not been begun.

        Raises:
            InputError: if it is none.
        """
        try:
            content = path.read_bytes()
            lines = content.split(b"\n")[:-1]
            header, *entries = (json.loads(line) for line in lines)
            if header["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {header['format_version']}, expected {FORMAT_VERSION}")
            identity = Identity(header["settings"], tuple(header["sources"]))
            shards: list[list[ShardRecord]] = [[] for _ in range(header["outputs"])]
            begun, read, state, complete = [TextCounts()] * len(shards), [], State(), False
            named: list[str] = []
            for entry in entries:
                for output, records in zip(shards, entry["shards"], strict=True):
                    output += [ShardRecord.of(item) for item in records]
                begun = [TextCounts(**counts) for counts in entry["begun"]]
                read += [SourceRecord(**item) for item in entry["read"]]
                named += entry["named"]
                skipped = Skipped(entry["reasons"], entry["bad"], tuple(named))
                state = State(Place(*entry["place"]), entry["seen"], skipped, entry["block"])
                complete = entry["complete"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a journal of preprocessing ({type(error).__name__}: {error})") from error
        kept = sum(len(line) + 1 for line in lines)
        if kept < len(content):
            os.truncate(path, kept)
        whole = tuple(map(tuple, shards)), tuple(begun), tuple(read), state, complete
        return cls(path, identity, *whole, header["block_characters"])

    def append(
        self,
        shards: Sequence[Sequence[ShardRecord]],
        begun: Sequence[TextCounts],
        read: Sequence[SourceRecord],
        state: State,
        complete: bool,
    ) -> "Journal":
        """Write what has been done since, on disk when this returns; the journal with it."""
        entry = {
            "shards": [[dataclasses.asdict(record) for record in records] for records in shards],
            "begun": [dataclasses.asdict(counts) for counts in begun],
            "read": [dataclasses.asdict(record) for record in read],
            "place": state.place,
            "seen": state.seen,
            "reasons": state.skipped.reasons,
            "bad": state.skipped.bad,
            "named": state.skipped.named[len(self.state.skipped.named) :],
            "block": state.block,
            "complete": complete,
        }
        with naming(self.path), self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        whole = tuple((*old, *new) for old, new in zip(self.shards, shards, strict=True))
        return dataclasses.replace(
            self, shards=whole, begun=tuple(begun), read=(*self.read, *read), state=state, complete=complete
        )


def journal_path(prefix: Path) -> Path:
    """Where the journal of a prefix lies."""
    return prefix.with_name(prefix.name + ".unfinished.jsonl")
