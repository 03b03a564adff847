"""The files of a checkpoint: hashed while they are written, and read without running anything that they hold.

torch.save writes pickles, which may call anything when they are loaded. Ours hold tensors, plain values and a few
classes of DeepSpeed and torch; what asks for another is refused before it is made.
"""

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ecp_scale.errors import InputError
from ecp_scale.files import copy_file


class Plain:
    """Stands for an object of DeepSpeed in a file that is read without DeepSpeed; has its attributes."""


SAFE_GLOBALS: tuple[tuple[Any, str], ...] = (
    (Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)
"""Classes in DeepSpeed's files besides those that torch allows by itself, and what is made in their place."""
READ_BYTES = 1 << 22
WRITE_BYTES = 1 << 20
READING = threading.Lock()
READERS = 4
"""Files that are hashed at a time."""


class FileRecord(NamedTuple):
    """Size and XXH3 hash of a file; no hash where an earlier version wrote it."""

    size: int
    xxh3: str = ""

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Size and hash of a file as it is now."""
        hashed = _Hashed(None)
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                hashed.write(block)
        return hashed.record

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file beside its record: missing, of another size, or of other content."""
        try:
            size = path.stat().st_size
            if size != self.size:
                return f"has {size} bytes, expected {self.size}"
            if self.xxh3 and (found := FileRecord.of(path).xxh3) != self.xxh3:
                return f"is damaged: its {size} bytes have the hash {found}, {self.xxh3} when they were written"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        return None


def write_states(states: Any, path: Path) -> FileRecord:
    """``torch.save`` to a file that is on disk when this returns.

    Raises:
        OSError: the first one, whatever torch made of it.
    """
    with path.open("wb") as file:
        hashed = _Hashed(file)
        try:
            with _without_crc():
                torch.save(states, hashed)  # type: ignore[arg-type]
        except Exception:
            if hashed.error is not None:
                raise hashed.error from None
            raise
        if hashed.error is not None:
            raise hashed.error
        file.flush()
        os.fsync(file.fileno())
        return hashed.record


@contextmanager
def _without_crc() -> Iterator[None]:
    """Leave out the checksums of the zip format, a third of the time: ours is over the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class SavedFile:
    """A file that is opened when something of it is read, and stays open as long as anything refers to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb", buffering=0)

    def read(self, out: memoryview, begin: int) -> None:
        """Fill ``out`` with the bytes from ``begin`` on.

        Raises:
            InputError: if the file ends before, or cannot be read.
        """
        done = 0
        try:
            while done < len(out):
                read = os.preadv(self._file.fileno(), [out[done:]], begin + done)
                if not read:
                    raise InputError(f"{self.path}: ends at byte {begin + done}, expected {begin + len(out)}")
                done += read
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class SavedTensor:
    """Where a file of ``write_states`` holds a tensor; its elements are read when they are asked for."""

    file: SavedFile
    offset: int
    """In bytes, of the first element."""
    dtype: torch.dtype
    shape: torch.Size

    def read(self, out: Tensor, start: int = 0) -> None:
        """Fill a contiguous ``out`` of the same type with the elements from ``start`` on."""
        into = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.file.read(into, self.offset + start * self.dtype.itemsize)


def read_states(
    path: Path, map_location: Any = None, classes: Sequence[Any] = SAFE_GLOBALS, tensors: bool = True
) -> Any:
    """What ``torch.save`` wrote.

    Args:
        path: of the file.
        map_location: as ``torch.load`` takes it.
        classes: that it may hold, as ``torch.serialization.safe_globals`` takes them.
        tensors: read them; else each comes as a ``SavedTensor``.

    Raises:
        InputError: if it holds anything but tensors, plain values and ``classes``, or is damaged.
    """
    try:
        # The list of classes is of the process, and threads come here.
        with READING, torch.serialization.safe_globals(list(classes)):
            if tensors:
                return torch.load(path, map_location=map_location, weights_only=True)
            with FakeTensorMode():  # under which torch says where in the file they lie
                found = torch.load(path, weights_only=True)
            file = SavedFile(path)
            return tree_map_only(Tensor, lambda tensor: _saved(file, tensor), found)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # A damaged pickle raises anything.
        reason = str(error).replace("WeightsUnpickler error: ", "").strip()
        foreign = next((line for line in reason.splitlines() if "Unsupported" in line or "GLOBAL" in line), None)
        what = f"holds what is not loaded: {foreign}" if foreign else f"cannot be read ({type(error).__name__})"
        raise InputError(f"{path}: {what}") from error


def _saved(file: SavedFile, tensor: Tensor) -> SavedTensor:
    storage: Any = tensor.untyped_storage()
    offset = storage._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
    return SavedTensor(file, offset, tensor.dtype, tensor.shape)


def copy_hashed(source: Path, target: Path) -> FileRecord:
    """Copy a file to disk.

    Raises:
        OSError: naming the one of the two that the copy failed at.
    """
    copy_file(source, target)
    return FileRecord.of(target)


def damages(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What is wrong with some files of a folder, by name; each is read from front to end."""
    names = sorted(files)
    with ThreadPoolExecutor(READERS) as pool:
        problems = pool.map(lambda name: files[name].problem(folder / name), names)
        return [f"{folder / name} {problem}" for name, problem in zip(names, problems, strict=True) if problem]


def free_bytes(path: Path) -> int:
    """Free bytes of the file system where a path lies or would lie."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


def write_error(path: Path, error: OSError) -> str:
    """One line about a file that cannot be written, with the free bytes where a full disk is the reason."""
    text = f"{error.filename or path} cannot be written ({error.strerror or error})"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += f", {free_bytes(path):,} bytes are free"
    return text


class _Hashed:
    """A file that is hashed while it is written. Trap: torch hides an error of the file behind one of its own."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self.error: OSError | None = None

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._size, self._hash.hexdigest())

    def write(self, block: Any) -> int:
        view = memoryview(block).cast("B")
        # Trap: given gigabytes at once, the kernel takes several times as long.
        for start in range(0, len(view), WRITE_BYTES):
            part = view[start : start + WRITE_BYTES]
            if self._file is not None and self.error is None:
                try:
                    self._file.write(part)
                except OSError as error:
                    self.error = error
            self._hash.update(part)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing, which torch asks for."""
