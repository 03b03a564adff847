"""Whole fp32 tensors out of a checkpoint of any layout: weights, and what the optimizer remembers of each.

DeepSpeed's files hold flat partitions: of each tensor rank's share, every data-parallel rank has a run of elements. The
runs are joined to shares, and the shares merged by what the parameters said of themselves when the checkpoint was
written. (DeepSpeed's own converter refuses checkpoints with tensor parallelism, mistaking the files of other ranks for
leftovers.) Files are mapped into memory, so that no more than one parameter is held at a time.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ecp_scale.checkpoint.files import read_states
from ecp_scale.checkpoint.folder import CheckpointRecord
from ecp_scale.errors import InputError

WEIGHT = "weight"
"""Key of the parameter itself among its states."""
STEP = "step"
"""Key of the number of updates, the one state that is a number and not as large as the parameter."""
States: TypeAlias = dict[str, Tensor]
"""Of one parameter: its weight, and the optimizer's states, by their names there."""
Runs: TypeAlias = dict[str, list[States]]
"""Of every parameter of one tensor rank: flat runs of elements, in order."""


def whole_weights(folder: Path, record: CheckpointRecord) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor (fp32, no padding of the vocabulary) of every parameter, one at a time.

    Args:
        folder: a complete checkpoint.
        record: its record.

    Raises:
        InputError: if the files disagree with each other or with the record.
    """
    return ((name, states[WEIGHT]) for name, states in whole_states(folder, record, None))


def whole_states(
    folder: Path, record: CheckpointRecord, optimizer_order: Sequence[str] | None
) -> Iterator[tuple[str, States]]:
    """The same with the states of the optimizer.

    Args:
        folder: a complete checkpoint.
        record: its record.
        optimizer_order: names of all parameters in the order in which the optimizer has them, by which ZeRO-0
            numbers its states; None leaves those out.

    Raises:
        InputError: if the files disagree with each other or with the record.
    """
    shares = [_rank_runs(folder, rank, optimizer_order) for rank in range(record.tensor_parallel)]
    for rank, (runs, _) in enumerate(shares):
        if set(runs) != set(record.layouts):
            odd = ", ".join(sorted(set(runs) ^ set(record.layouts)))
            raise InputError(f"{folder}: tensor rank {rank} and the record disagree about {odd}")
    for name, layout in record.layouts.items():
        try:
            joined = [_joined(runs[name], shapes[name]) for runs, shapes in shares]
            whole = {
                key: tensor if key == STEP else layout.merge([share[key] for share in joined])
                for key, tensor in joined[0].items()
            }
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: parameter {name}: {error}") from error
        yield name, whole


def _joined(runs: list[States], shape: torch.Size) -> States:
    """A tensor rank's share of one parameter from the runs of the data-parallel ranks."""
    return {
        key: value.float() if key == STEP else torch.cat([run[key].flatten() for run in runs]).float().reshape(shape)
        for key, value in runs[0].items()
    }


def _rank_runs(folder: Path, rank: int, optimizer_order: Sequence[str] | None) -> tuple[Runs, dict[str, torch.Size]]:
    """What the files of one tensor rank hold of every parameter, and the shapes of its shares."""
    model_files, optimizer_files = (_files(folder, rank, kind) for kind in ("model", "optim"))
    if not model_files:
        raise InputError(f"{folder}: no files of tensor rank {rank}")
    content = _load(model_files[0])
    runs: Runs = {}
    if not optimizer_files:
        # ZeRO-0, which is fp32: the model file holds the weights as they are, and the optimizer's states by number.
        numbers = {} if optimizer_order is None else {name: number for number, name in enumerate(optimizer_order)}
        states = content["optimizer"]["state"]
        for name, weight in content["module"].items():
            runs[name] = [{WEIGHT: weight, **states.get(numbers.get(name, -1), {})}]
        return runs, {name: weight.shape for name, weight in content["module"].items()}
    shapes = {name: shape for group in content["param_shapes"] for name, shape in group.items()}
    for number, file in enumerate(optimizer_files):
        for name, states in _partition(_load(file)["optimizer_state_dict"], content, number, len(optimizer_files)):
            runs.setdefault(name, []).append(states)
    return runs, shapes


def _partition(saved: dict[str, Any], model: dict[str, Any], rank: int, ranks: int) -> Iterator[tuple[str, States]]:
    """Name and run of elements of every parameter that one data-parallel rank has a part of."""
    if "fp32_flat_groups" in saved:  # ZeRO-3 cuts every parameter into equal runs, the last ones padded
        flats, base, groups = saved["fp32_flat_groups"], saved["optimizer_state_dict"], []
        for shapes in model["param_shapes"]:
            group, start = {}, 0
            for name, shape in shapes.items():
                length = -(-shape.numel() // ranks)
                group[name] = (start, max(0, min(length, shape.numel() - rank * length)))
                start += length
            groups.append(group)
    else:  # ZeRO-1 and ZeRO-2 cut groups of parameters, and say where each one lies
        flats, base = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]
        groups = [
            {name: (run.start, run.numel) for name, run in mapping.items()} for mapping in saved["param_slice_mappings"]
        ]
    for number, group in enumerate(groups):
        states = {WEIGHT: flats[number], **base["state"].get(number, {})}
        for name, (start, length) in group.items():
            yield name, {key: value if key == STEP else value[start : start + length] for key, value in states.items()}


def _files(folder: Path, rank: int, kind: str) -> list[Path]:
    """Files of one tensor rank, in the order of the data-parallel ranks."""
    pattern = re.compile(rf"(?:(?:bf16_)?zero_pp_rank_(\d+)_)?mp_rank_{rank:02d}_{kind}_states\.pt")
    found = [(match, path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1] or 0), path) for match, path in found)]


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_states(path, "cpu", mmap=True)
    return content
