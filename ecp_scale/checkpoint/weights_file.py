"""The weights of an exported model in the safetensors format, written piece by piece: no tensor is whole in memory.

One file, or several with an index, as Hugging Face names them. The library wants all tensors of a file at once to
write it; the format is a JSON header and the tensors' bytes. Reading is the library's.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ecp_scale.errors import InputError
from ecp_scale.files import write_text
from ecp_scale.parallel.digests import as_text, difference, digest

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 5_000_000_000
"""Most bytes of tensors in a file, unless one tensor alone has more."""
DIGESTS = "ecp_digests"
"""Key of the tensors' digests in a file's metadata."""
PIECE = 1 << 18
"""Elements that are in memory at a time. Trap: the kernel takes more than a megabyte at once twice as long."""
TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class _File(NamedTuple):
    name: str
    tensors: list[str]


class WriteOptions(NamedTuple):
    """How weights are written."""

    dtype: torch.dtype = torch.float32
    file_bytes: int = FILE_BYTES
    """Most bytes of tensors in a file."""
    workers: int = 1
    """Files that are written at a time."""
    progress: bool = False
    """Show how far it is, on a terminal."""
    average: bool = False
    """The moving average of the weights in place of the last ones."""


PLAIN = WriteOptions()


def write_weights(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str, int, int], Tensor],
    options: WriteOptions = PLAIN,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write all tensors; they are on disk when this returns. Files that are there already, and whole, are left.

    Each file says the digests (``ecp_scale.parallel.digests``) of what is written, in the metadata of its header, which
    transformers do not keep when they save a model.

    Args:
        folder: an existing one.
        shapes: of every tensor, by name, in the order in which they are written.
        read: the elements of a tensor from one number up to another, flat; called by several threads.
        options: how.
        digests: that the elements that are read must have, by name; empty where they are not known.

    Raises:
        InputError: naming the first tensor with another digest.
        OSError: if a file cannot be written.
    """
    sizes = {name: math.prod(shape) * options.dtype.itemsize for name, shape in shapes.items()}
    files = _files(sizes, options.file_bytes)
    total = sum(sizes.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None if options.progress else True, desc="weights")

    def write_tensor(out: FileIO, name: str) -> str:
        elements, saved, written = math.prod(shapes[name]), 0, 0
        for start in range(0, elements, PIECE):
            exact = read(name, start, min(start + PIECE, elements))
            piece = exact.to(options.dtype)
            saved += digest(exact, start=start)
            written += digest(piece, start=start) if options.dtype != torch.float32 else 0
            write_all(out, memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            bar.update(piece.nbytes)
        wrong = difference({name: as_text(saved)}, {name: digests[name]}) if digests else None
        if wrong is not None:
            raise InputError(f"the weights are not those that were saved: {wrong}")
        return as_text(written if options.dtype != torch.float32 else saved)

    def write(file: _File) -> None:
        target = folder / file.name
        if target.exists() and _is_whole(target, file.tensors, digests if options.dtype == torch.float32 else {}):
            bar.update(sum(sizes[name] for name in file.tensors))
            return
        unfinished = target.with_name(target.name + ".tmp")
        shares = {name: list(shapes[name]) for name in file.tensors}
        written = dict.fromkeys(file.tensors, as_text(0))
        with unfinished.open("wb", buffering=0) as out:
            out.write(_header(shares, options.dtype, written))
            for name in file.tensors:
                written[name] = write_tensor(out, name)
            out.seek(0)
            out.write(_header(shares, options.dtype, written))
            os.fsync(out.fileno())
        unfinished.replace(target)

    with bar, ThreadPoolExecutor(options.workers) as pool:
        for _ in pool.map(write, files):
            pass
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: f.name for f in files for name in f.tensors}}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _is_whole(path: Path, names: Sequence[str], digests: Mapping[str, str]) -> bool:
    """Whether a file holds what its header says was written to it, and what has these digests."""
    try:
        with safe_open(path, framework="pt") as opened:
            stated = json.loads((opened.metadata() or {})[DIGESTS])
            found = {name: StoredTensor(opened, name).digest() for name in names}
    except (OSError, SafetensorError, ValueError, KeyError):
        return False
    return found == stated and all(digests.get(name, text) == text for name, text in stated.items())


def write_all(out: FileIO, block: memoryview) -> None:
    """Write all of a block: a disk that fills up takes a part of it, and says so at the next call."""
    while block:
        block = block[out.write(block) or 0 :]


def _files(sizes: Mapping[str, int], file_bytes: int) -> list[_File]:
    shares: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shares[-1] and used + size > file_bytes:
            shares.append([])
            used = 0
        shares[-1].append(name)
        used += size
    if len(shares) == 1:
        return [_File(WEIGHTS, shares[0])]
    return [_File(f"model-{n:05d}-of-{len(shares):05d}.safetensors", names) for n, names in enumerate(shares, start=1)]


def _header(shapes: Mapping[str, list[int]], dtype: torch.dtype, digests: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt", DIGESTS: json.dumps(digests)}}
    start = 0
    for name, shape in shapes.items():
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        content[name] = {"dtype": TYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; ``stored[:]`` reads all of it, ``stored[2:4, 1:]`` that part alone."""

    file: Any
    name: str

    @property
    def shape(self) -> list[int]:
        """Of the whole tensor."""
        shape: list[int] = self.file.get_slice(self.name).get_shape()
        return shape

    def __getitem__(self, index: Any, /) -> Tensor:
        part: Tensor = self.file.get_slice(self.name)[index]
        return part

    def digest(self) -> str:
        """Of what the file holds now; some rows are in memory at a time."""
        rows, width = self.shape[0], math.prod(self.shape[1:])
        step = max(1, PIECE // width)
        starts = range(0, rows, step)
        return as_text(sum(digest(self[first : first + step].flatten(), start=first * width) for first in starts))


class SavedWeights(Mapping[str, StoredTensor]):
    """The tensors of an exported model by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the files.

        Raises:
            InputError: if one is missing or damaged.
        """
        self.path = folder / INDEX if (folder / INDEX).exists() else folder / WEIGHTS
        names, path = [WEIGHTS], self.path
        try:
            if self.path.name == INDEX:
                names = sorted(set(json.loads(self.path.read_text())["weight_map"].values()))
            if names != [WEIGHTS] and (folder / WEIGHTS).exists():
                # transformers leave what was there when they save into a folder, and read the one file.
                if any((folder / Path(name).name).exists() for name in names):
                    raise InputError(
                        f"{folder}: holds {WEIGHTS} and the files of {INDEX}; remove what is not the model"
                    )
                self.path, names = folder / WEIGHTS, [WEIGHTS]
            self._files: dict[str, Any] = {}
            digests: dict[str, str] = {}
            for path in (folder / Path(name).name for name in names):
                opened = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)
                digests |= json.loads((opened.metadata() or {}).get(DIGESTS, "{}"))
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cannot be read ({error})") from error

        self.digests = digests if digests.keys() == self._files.keys() else {}
        """Of every tensor, as it was written; empty where something else has written one of them."""

    def __getitem__(self, name: str) -> StoredTensor:
        return StoredTensor(self._files[name], name)

    def computed_digests(self) -> dict[str, str]:
        """Of every tensor, as it is now; a row of one is in memory at a time."""
        return {name: self[name].digest() for name in self}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
