"""What a preprocessing run has finished: PREFIX.unfinished.json, until the manifest replaces it."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecp_scale.data.files import write_text
from ecp_scale.data.manifest import ShardRecord, Skipped, TextCounts
from ecp_scale.data.sources import Place
from ecp_scale.errors import InputError


@dataclass(frozen=True)
class Journal:
    """Finished shards, the place where the next one begins, and what was left out before it.

    ``complete`` says that there is no next one: only names and the manifest are missing.
    """

    identity: dict[str, Any]
    shards: tuple[ShardRecord, ...] = ()
    place: Place = field(default_factory=Place)
    skipped: Skipped = field(default_factory=Skipped)
    complete: bool = False

    def write(self, prefix: Path) -> None:
        """Write it atomically."""
        write_text(journal_path(prefix), json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, prefix: Path, identity: dict[str, Any]) -> "Journal":
        """The journal of this run, empty where it has not begun.

        Raises:
            InputError: if what was begun under this prefix is another run.
        """
        path = journal_path(prefix)
        if not path.exists():
            return cls(identity)
        try:
            content = json.loads(path.read_text())
            shards = tuple(ShardRecord.of(item) for item in content["shards"])
            place, skipped = Place(**content["place"]), Skipped.of(content["skipped"])
            begun = cls(content["identity"], shards, place, skipped, content["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a journal of preprocessing ({type(error).__name__}: {error})") from error
        check_same_run(path, begun.identity, identity)
        return begun

    def totals(self) -> TextCounts:
        """Counts of all finished shards."""
        return sum((shard.counts for shard in self.shards), TextCounts())


def journal_path(prefix: Path) -> Path:
    """Where the journal of a prefix lies."""
    return prefix.with_name(prefix.name + ".unfinished.json")


def check_same_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a prefix that belongs to another run.

    Raises:
        InputError: listing what differs.
    """
    changed = [key for key in now if before.get(key) != now[key]]
    differences = [f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in changed]
    if differences:
        raise InputError(
            f"{path}: belongs to another run; choose another prefix or remove its files:\n"
            + "\n".join(f"  - {text}" for text in differences)
        )
