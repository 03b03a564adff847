"""What DeepSpeed's files hold: flat partitions of each tensor-parallel rank's parameters, and how they are cut.

Of each tensor-parallel rank's part, every data-parallel rank has a run of elements; the runs are joined here.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ecp_scale.errors import InputError
from ecp_scale.zero.state_files import read_states

WEIGHT = "weight"
"""Key of the parameter itself among its states."""
STEP = "step"
"""Key of the number of updates, the one state that is a number and not as large as the parameter."""
ParameterStates: TypeAlias = dict[str, Tensor]
"""Of one parameter: its weight, and the optimizer's states, by their names there."""
Runs: TypeAlias = dict[str, list[ParameterStates]]
"""Of every parameter of one tensor-parallel rank: flat runs of elements, in the order of the data-parallel ranks."""


def join_runs(runs: list[ParameterStates], shape: torch.Size) -> ParameterStates:
    """A tensor-parallel rank's part of one parameter, in fp32, from the runs of the data-parallel ranks."""
    return {
        key: value.float() if key == STEP else torch.cat([run[key].flatten() for run in runs]).float().reshape(shape)
        for key, value in runs[0].items()
    }


def read_runs(folder: Path, rank: int, optimizer_order: Sequence[str] | None) -> tuple[Runs, dict[str, torch.Size]]:
    """What the files of one tensor-parallel rank hold of every parameter, and the shapes of its parts.

    Args:
        folder: a complete checkpoint.
        rank: tensor-parallel rank.
        optimizer_order: names of all parameters in the order in which the optimizer has them, by which ZeRO-0
            numbers its states; None leaves those out.

    Raises:
        InputError: if there are no files of that rank.
    """
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


def _partition(
    saved: dict[str, Any], model: dict[str, Any], rank: int, ranks: int
) -> Iterator[tuple[str, ParameterStates]]:
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
