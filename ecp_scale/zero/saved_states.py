"""What DeepSpeed's files hold of every parameter, read by element.

Of each tensor-parallel rank's share of a parameter, every data-parallel rank has saved a piece. Whoever asks for some
elements of the whole parameter gets them from the pieces that hold them, and nothing else is read. (DeepSpeed's own
converter refuses checkpoints with tensor parallelism, mistaking the files of other ranks for leftovers.)
"""

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ecp_scale.errors import InputError
from ecp_scale.files import raised_limit_of_files
from ecp_scale.parallel.partition import Partition, Share
from ecp_scale.zero.state_files import SavedTensor, read_states

WEIGHT = "weight"
"""Key of the parameter itself among its states."""
STEP = "step"
"""Key of the number of updates, the one state that is a number and not as large as the parameter."""
DEEPSPEED = "0.19"
"""Whose files are known."""
ParameterStates: TypeAlias = dict[str, Tensor]
"""Of one parameter: its weight, and the optimizer's states, by their names there."""


class Piece(NamedTuple):
    """The elements of a tensor-parallel rank's share, from ``start`` up to ``stop``, that one file holds."""

    start: int
    stop: int
    states: Callable[[], Mapping[str, SavedTensor]]
    """Opens the file."""
    offset: int
    """Number of the first of them in the tensors of ``states``."""


class TensorRank(NamedTuple):
    """The files of one tensor-parallel rank: of every parameter the shape of its share and its pieces, in order."""

    shapes: dict[str, torch.Size]
    pieces: dict[str, list[Piece]]


class SavedStates:
    """The states of all parameters of a checkpoint."""

    def __init__(
        self,
        folder: Path,
        files: Iterable[str],
        partitions: Mapping[str, Partition],
        tensor_parallel: int,
        optimizer_order: Sequence[str] | None = None,
    ) -> None:
        """Look into the files; no state is read yet.

        Args:
            folder: a complete checkpoint.
            files: names of its files, by its record: what else lies there is not of it.
            partitions: how every parameter is stored, by name.
            tensor_parallel: ranks of a tensor group.
            optimizer_order: names of all parameters in the order in which the optimizer has them, by which ZeRO-0
                numbers its states; None leaves those out.

        Raises:
            InputError: if the files are damaged, or disagree with ``partitions``.
        """
        raised_limit_of_files()  # each file stays open once it has been read
        self.folder = folder
        self.partitions = partitions
        names = list(files)
        with self._laid_out_as_known():
            self._ranks = [_tensor_rank(folder, names, rank, optimizer_order) for rank in range(tensor_parallel)]
        for rank, (shapes, pieces) in enumerate(self._ranks):
            odd = sorted(set(shapes) ^ set(partitions) | set(pieces) ^ set(partitions))
            if odd:
                named = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
                raise InputError(f"{folder}: tensor rank {rank} and the record disagree about {named}")
            for name, parts in pieces.items():
                borders = [0, *(part.stop for part in parts)]
                if [part.start for part in parts] != borders[:-1] or borders[-1] != shapes[name].numel():
                    raise InputError(
                        f"{folder}: the files of tensor rank {rank} hold {borders[-1]} elements of {name}, expected "
                        f"{shapes[name].numel()}"
                    )

    @contextmanager
    def _laid_out_as_known(self) -> Iterator[None]:
        """Say of files that hold something else what they are not."""
        try:
            yield
        except (KeyError, AttributeError, IndexError, TypeError, RuntimeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{self.folder}: its files are not laid out as DeepSpeed {DEEPSPEED} does it ({what})"
            ) from error

    def shape(self, name: str) -> list[int]:
        """Shape of a whole parameter, without padding."""
        return self.partitions[name].whole_shape(self._ranks[0].shapes[name], len(self._ranks))

    def keys(self, name: str) -> list[str]:
        """Which states of a parameter there are, the weight among them."""
        with self._laid_out_as_known():
            return list(self._ranks[0].pieces[name][0].states())

    def weight(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a whole parameter without padding, from one number up to another, flat and in fp32."""
        return self.values(name, start, stop, WEIGHT)

    def values(self, name: str, start: int, stop: int, key: str) -> Tensor:
        """The same of one of its states, by its key there."""
        elements = math.prod(self.shape(name))
        return self.read(name, Share(1, elements, elements, 0, elements), start, stop, [key])[key]

    def read(self, name: str, share: Share, start: int, stop: int, keys: Sequence[str]) -> ParameterStates:
        """Some elements of a parameter, in fp32.

        Args:
            name: of the parameter.
            share: where the asking rank's share lies in the whole parameter.
            start: the first element of the share that is asked for.
            stop: the one after the last; elements of padding, and behind the share's end, are 0.
            keys: the states that are asked for.

        Returns:
            Flat tensors, but for ``STEP``.

        Raises:
            InputError: if a file cannot be read, or ranks that should hold the same elements do not.
        """
        numbers = range(len(self._ranks))
        copies = [[number] for number in numbers] if self.partitions[name].partition_dim is None else [numbers]
        with self._laid_out_as_known():
            found, *others = [self._read(name, share, start, stop, keys, ranks) for ranks in copies]
        if any(not equal_bits(found[key], other[key]) for other in others for key in keys):
            raise InputError(f"{self.folder}: parameter {name}: its copies on the tensor-parallel ranks differ")
        return found

    def _read(
        self, name: str, share: Share, start: int, stop: int, keys: Sequence[str], ranks: Sequence[int]
    ) -> ParameterStates:
        """What some tensor-parallel ranks hold of the elements, the rest 0."""
        out = {key: torch.zeros(() if key == STEP else stop - start) for key in keys}
        for number in ranks:
            shapes, pieces = self._ranks[number]
            place = self.partitions[name].share(shapes[name], len(self._ranks), number)
            for part in share.common(start, stop, place):
                into = {key: values[part.target :] for key, values in out.items() if key != STEP}
                if part.rows == 1:
                    _read(pieces[name], part.source, part.length, into)
                    continue
                read = {key: torch.empty(part.rows, part.length) for key in into}
                elements = part.rows * part.length
                _read(pieces[name], part.source, elements, {key: values.view(-1) for key, values in read.items()})
                for key, values in read.items():
                    into[key].as_strided(values.shape, (part.stride, 1), into[key].storage_offset()).copy_(values)
            if STEP in out:
                pieces[name][0].states()[STEP].read(out[STEP])
        return out


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two fp32 tensors are the same to the bit; what is not a number is equal to itself."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _read(pieces: list[Piece], source: int, length: int, out: ParameterStates) -> None:
    """Read elements of a share, from wherever they are."""
    first = max(0, bisect_right(pieces, source, key=lambda piece: piece.start) - 1)
    for piece in itertools.islice(pieces, first, None):
        low, high = max(source, piece.start), min(source + length, piece.stop)
        if low >= high:
            return
        states = piece.states()
        for key, into in out.items():
            values = into[low - source : high - source]
            saved, begin = states[key], piece.offset + low - piece.start
            if saved.dtype == values.dtype:
                saved.read(values, begin)
            else:
                narrow = torch.empty(len(values), dtype=saved.dtype)
                saved.read(narrow, begin)
                values.copy_(narrow)


def _tensor_rank(folder: Path, names: list[str], rank: int, optimizer_order: Sequence[str] | None) -> TensorRank:
    model_files, optimizer_files = (_files(folder, names, rank, kind) for kind in ("model", "optim"))
    if not model_files:
        raise InputError(f"{folder}: no files of tensor rank {rank}")
    content = read_states(model_files[0], tensors=False)
    if not optimizer_files:
        # ZeRO-0, which is fp32: the model file holds the weights as they are, and the optimizer's states by number.
        numbers = {} if optimizer_order is None else {name: number for number, name in enumerate(optimizer_order)}
        states = content["optimizer"]["state"]
        shapes = {name: weight.shape for name, weight in content["module"].items()}
        pieces = {
            name: [Piece(0, weight.shape.numel(), _known({WEIGHT: weight, **states.get(numbers.get(name, -1), {})}), 0)]
            for name, weight in content["module"].items()
        }
        return TensorRank(shapes, pieces)
    shapes = {name: torch.Size(shape) for group in content["param_shapes"] for name, shape in group.items()}
    first = read_states(optimizer_files[0], tensors=False)["optimizer_state_dict"]
    if "fp32_flat_groups" in first:
        return TensorRank(shapes, _pieces_of_parameters(shapes, first, optimizer_files))
    pieces = {}
    for file in optimizer_files:
        _add_pieces_of_groups(pieces, read_states(file, tensors=False)["optimizer_state_dict"])
    return TensorRank(shapes, pieces)


def _pieces_of_parameters(
    shapes: dict[str, torch.Size], first: dict[str, Any], files: list[Path]
) -> dict[str, list[Piece]]:
    """ZeRO-3 cuts every parameter into equal runs, the last ones padded: other files are opened when they are needed.

    A rank's runs lie one after another in flat tensors, of which there may be several of each optimizer group
    (``sub_group_size``); none holds a part of a run.
    """

    @cache
    def opened(rank: int) -> dict[str, Any]:
        content: dict[str, Any] = read_states(files[rank], tensors=False)["optimizer_state_dict"]
        return content

    def states_of(rank: int, flat: int) -> Callable[[], Mapping[str, SavedTensor]]:
        return lambda: {
            WEIGHT: opened(rank)["fp32_flat_groups"][flat],
            **opened(rank)["optimizer_state_dict"]["state"].get(flat, {}),
        }

    pieces = {}
    flat, offset = 0, 0
    for name, shape in shapes.items():
        length = -(-shape.numel() // len(files))
        if offset == first["fp32_flat_groups"][flat].shape.numel():
            flat, offset = flat + 1, 0
        starts = range(0, shape.numel(), length)
        pieces[name] = [
            Piece(start, min(start + length, shape.numel()), states_of(rank, flat), offset)
            for rank, start in enumerate(starts)
        ]
        offset += length
    return pieces


def _add_pieces_of_groups(pieces: dict[str, list[Piece]], saved: dict[str, Any]) -> None:
    """ZeRO-1 and ZeRO-2 cut groups of parameters, and say where each one lies."""
    base = saved["base_optimizer_state"]["state"]
    for number, mapping in enumerate(saved["param_slice_mappings"]):
        states = _known({WEIGHT: saved["single_partition_of_fp32_groups"][number], **base.get(number, {})})
        for name, run in mapping.items():
            before = pieces.setdefault(name, [])
            start = before[-1].stop if before else 0
            before.append(Piece(start, start + run.numel, states, run.start))


def _known(states: Mapping[str, SavedTensor]) -> Callable[[], Mapping[str, SavedTensor]]:
    return lambda: states


def _files(folder: Path, names: list[str], rank: int, kind: str) -> list[Path]:
    """Files of one tensor rank, in the order of the data-parallel ranks."""
    pattern = re.compile(rf"(?:(?:bf16_)?zero_pp_rank_(\d+)_)?mp_rank_{rank:02d}_{kind}_states\.pt")
    found = [match for name in names if (match := pattern.fullmatch(name))]
    return [folder / match[0] for match in sorted(found, key=lambda match: int(match[1] or 0))]
