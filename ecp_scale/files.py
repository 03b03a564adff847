"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

import hashlib
import json
import math
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ecp_scale.errors import InputError

WANTED_FILES = 1 << 16
"""Open files of a process, where its hard limit allows it."""


def raised_limit_of_files() -> int:
    """Raise the soft limit of open files, which shells set low; how many may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_FILES:
        soft = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(soft, WANTED_FILES)


def read_object(path: Path, name: str, expected: str = "an object") -> dict[str, Any]:
    """Read a JSON object that a user has named.

    Args:
        path: of the file.
        name: of it in an error.
        expected: what it should hold.

    Raises:
        InputError: if it cannot be read, or holds anything else.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_once)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not valid UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is one too
        raise InputError(f"{name}: not valid JSON, {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name}: found a {type(content).__name__}, expected {expected}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice in an object")
        found[key] = value
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` of the block the name of ``path``, if it has none.

    Trap: a write to an open file that fails, as where the disk is full, does not say to which.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; it appears, complete and on disk, when the block ends without an error.

    The temporary name belongs to this process alone.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path) if error.filename == str(temporary) else error.filename
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically.

    Raises:
        OSError: naming the one of the two that the copy failed at.
    """
    with source.open("rb") as content, atomic_write(target) as file:
        shutil.copyfileobj(content, file)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def scaled_bytes(size: float) -> str:
    """A number of bytes for people, such as 711.3 kB or 13.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.1f} {unit}" if unit != "bytes" else f"{size:,.0f} bytes"
        size /= 1000
    return f"{size:,.1f} TB"


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def finite(content: Any) -> Any:
    """What JSON can hold: the same with null for every number that is infinite or none, in lists and tables, too."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
