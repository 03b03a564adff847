"""Which sources a list of inputs names, and what lies among them that is not read, with the reason."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ecp_scale.errors import InputError
from ecp_scale.preparation.formats import endings, format_of
from ecp_scale.preparation.sources import HUB, STDIN, Source

NAMED_UNREAD = 10
"""Files that are named for each reason why they are not read; all are counted."""


@dataclass
class Found:
    """Sources in the order in which they are read, and by reason the files that are not."""

    sources: list[Source] = field(default_factory=list)
    unread: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, file: Path, reason: str) -> None:
        """Say that a file is not read."""
        self.unread.setdefault(reason, []).append(str(file))

    @property
    def reasons(self) -> dict[str, dict[str, object]]:
        """By reason how many files are not read, and the first of them, as a manifest keeps it."""
        return {
            reason: {"files": len(files), "named": files[:NAMED_UNREAD]}
            for reason, files in sorted(self.unread.items())
        }


def find_sources(inputs: Sequence[str]) -> Found:
    """Files, patterns and ``-`` as named; all text below a named folder, in sorted order; saved and hub datasets.

    In folders, hidden files and folders are left out, and what preprocessing writes; links to folders are followed. A
    file that was found before is not read again.

    Raises:
        InputError: if an input is missing or of another kind, or there is nothing to read at all.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    try:
        for name in inputs:
            if name == STDIN or name.startswith(HUB):
                found.sources.append(Source(name))
            else:
                _take(found, _named(name, found), seen)
    except OSError as error:
        raise InputError(f"input {error.filename}: {error.strerror or error}") from error
    if not found.sources:
        raise InputError(f"the corpus is empty: no file with text in {', '.join(inputs) or 'no inputs'}{_why(found)}")
    return found


def _named(name: str, found: Found) -> Iterator[Path]:
    """Files that an input names: itself, what matches it as a pattern, and what lies below those that are folders."""
    path = Path(name)
    if path.is_dir():
        yield from _below(path, found)
    elif path.exists():
        if format_of(path.name) is None:
            raise InputError(f"input {path}: its ending is none of those that are read ({endings()})")
        yield path
    else:
        matches = _matching(name)
        if not matches:
            raise InputError(f"input {name}: no such file or folder, and no file matches it as a pattern")
        for match in matches:
            yield from _below(match, found) if match.is_dir() else _checked(match, found)


def _matching(pattern: str) -> list[Path]:
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207  (a Path cannot hold an absolute pattern)
    folders = [[parent.resolve() for parent in match.parents] for match in matches]
    # A link to a folder above itself gives the same files again and again.
    return [match for match, above in zip(matches, folders, strict=True) if len(set(above)) == len(above)]


def _why(found: Found) -> str:
    counts = [f"{len(files)} {reason}" for reason, files in sorted(found.unread.items())]
    return f" (not read: {'; '.join(counts)})" if counts else ""


def _take(found: Found, paths: Iterator[Path], seen: set[tuple[int, int]]) -> None:
    for path in paths:
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            found.leave(path, "the same file as one before")
        else:
            seen.add((status.st_dev, status.st_ino))
            found.sources.append(Source(str(path)))


def _below(folder: Path, found: Found) -> Iterator[Path]:
    """Files and saved datasets below a folder, in the order of their paths."""
    visited: set[tuple[int, int]] = set()
    files: list[Path] = []
    for name, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        here, status = Path(name), Path(name).stat()
        if (status.st_dev, status.st_ino) in visited:
            found.leave(here, "a link to a folder that was read already")
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        if is_saved_dataset(here):
            files.append(here)
            folders.clear()
            continue
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        files += [here / name for name in names if not name.startswith(".")]
    for path in sorted(files):
        if path.is_dir():
            yield path
        else:
            yield from _checked(path, found)


def _checked(path: Path, found: Found) -> Iterator[Path]:
    """The file, if it is one that is read."""
    reason = _why_not(path)
    if reason is None:
        yield path
    else:
        found.leave(path, reason)


def _refuse(error: OSError) -> None:
    raise InputError(f"input {error.filename}: {error.strerror or error}") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets`` saved a dataset to a folder.

    Raises:
        InputError: if it saved several splits there, of which one must be chosen.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise InputError(f"{folder}: holds the splits {', '.join(splits)}; name the folder of one of them")
    state = folder / "state.json"  # a name that others use too
    return state.is_file() and b'"_data_files"' in state.read_bytes()


def _why_not(path: Path) -> str | None:
    if not path.exists():
        return "a broken link"
    if not path.is_file():
        return "not a regular file"
    if format_of(path.name) is None and not WRITTEN.search(path.name):
        return "of an ending that is not read"
    if WRITTEN.search(path.name):
        return "written by preprocessing"
    return None if path.stat().st_size else "empty"


WRITTEN = re.compile(r"(-\d{5,}-of-\w+\.(bin|idx)|\.manifest\.json|\.unfinished\.jsonl|\.tokenizer\.(json|txt|model))$")
"""Names of what preprocessing writes beside its shards, under whatever prefix."""
