"""Whether all hosts see one folder, and what one of them writes is what the others read. All ranks take part."""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from ecp_scale.checkpoint.saving import SIGHT_SECONDS
from ecp_scale.doctor.findings import Finding, bad, note, ok
from ecp_scale.parallel.groups import decided, everyone

LEAST_FREE = 10 * 10**9
"""Bytes of a run folder, below which there is room for few checkpoints."""


def shared_folder(folder: Path) -> list[Finding]:
    """Write, rename and look for files, and tell how fast they reach the disk and how much room there is.

    Args:
        folder: where runs are to lie; made for the while if only it is missing, and not the folder that it is in.
    """
    token = decided(lambda: secrets.token_hex(8))
    place = folder / f".doctor-{token}"
    made = False
    with suppress(OSError):
        made = dist.get_rank() == 0 and not folder.exists()
    try:
        return _exchange(folder, place, token)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)
            if made:
                with suppress(OSError):
                    folder.rmdir()


def _exchange(folder: Path, place: Path, token: str) -> list[Finding]:
    rank, is_first = dist.get_rank(), dist.get_rank() == 0
    word, renamed, mine = place / "word", place / "renamed", place / f"rank-{dist.get_rank()}"

    def begin() -> None:
        folder.mkdir(exist_ok=True)
        place.mkdir()
        word.write_text(token)

    trouble = everyone(_trouble(begin, place) if is_first else None)[0]
    if trouble is not None:
        return [bad("folder", f"the first rank cannot write there: {trouble}")]
    sees = _within(lambda: word.read_text() == token)
    seen = everyone(sees)
    trouble = everyone(_trouble(lambda: word.rename(renamed) and None, word) if is_first else None)[0]
    follows = sees and trouble is None and _within(lambda: renamed.exists() and not word.exists())
    took = [0.0]
    own = _trouble(lambda: took.append(_write_through(mine)), mine) if sees else "not written"
    written = [other for other, failed in enumerate(everyone(own)) if failed is None]

    def unseen() -> list[int]:
        return [other for other in written if not (place / f"rank-{other}").exists()]

    room = _room(folder)  # while it is there: the first rank may have made it
    _within(lambda: not is_first or not unseen())
    lacking = everyone(_or_none(unseen) if is_first else [])[0]
    if not sees:
        return [bad("folder", f"{folder.absolute()} is not the folder that the first rank writes to")]
    if trouble is not None:
        return [bad("folder", f"the first rank cannot rename there: {trouble}")]
    if not follows:
        return [bad("folder", f"{folder.absolute()}: a file that the first rank renames keeps its old name here")]
    if own is not None or rank in lacking:
        return [bad("folder", own or f"what is written to {folder.absolute()} here, the first rank does not see")]
    everywhere = "shared by all ranks: written, renamed and seen" if all(seen) else "what the first rank writes is seen"
    slow = [note("folder", f"a megabyte takes {max(took):.1f} s to reach the disk")] if max(took) > 1 else []
    return [ok("folder", everywhere), *slow, room]


def _room(folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return bad("free space", f"{folder.absolute()}: {error.strerror or error}")
    return (ok if free >= LEAST_FREE else note)("free space", f"{free / 1e9:,.0f} GB free in {folder.absolute()}")


def _or_none(found: Callable[[], list[int]]) -> list[int]:
    with suppress(OSError):
        return found()
    return []


def _write_through(path: Path) -> float:
    """Seconds until a megabyte is on the disk."""
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _trouble(action: Callable[[], object], path: Path) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"
    return None


def _within(condition: Callable[[], bool]) -> bool:
    """Whether something becomes true in time; what cannot be read is not."""
    deadline = time.monotonic() + SIGHT_SECONDS
    while True:
        with suppress(OSError):
            if condition():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
