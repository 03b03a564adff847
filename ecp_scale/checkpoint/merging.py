"""Whole fp32 weights out of a checkpoint of any tensor-parallel size and ZeRO stage.

DeepSpeed's own converter knows its flat partitions but refuses checkpoints with tensor parallelism, mistaking the
files of the other ranks for leftovers. It is shown the files of one tensor rank at a time; the shares are then merged
by what the parameters said of themselves when the checkpoint was written.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ecp_scale.checkpoint.folder import CheckpointRecord
from ecp_scale.errors import InputError


class _Lazy(Protocol):
    def contiguous(self) -> Tensor: ...


def whole_weights(folder: Path, record: CheckpointRecord) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor (fp32, no padding of the vocabulary) of every parameter, one at a time.

    Args:
        folder: a complete checkpoint.
        record: its record.

    Raises:
        InputError: if the files disagree with each other or with the record.
    """
    shares = [_rank_weights(folder, rank) for rank in range(record.tensor_parallel)]
    for rank, share in enumerate(shares):
        if set(share) != set(record.layouts):
            odd = ", ".join(sorted(set(share) ^ set(record.layouts)))
            raise InputError(f"{folder}: tensor rank {rank} and the record disagree about {odd}")
    for name, layout in record.layouts.items():
        try:
            yield name, layout.merge([share[name].contiguous().float() for share in shares])
        except ValueError as error:
            raise InputError(f"{folder}: parameter {name}: {error}") from error


def _rank_weights(folder: Path, rank: int) -> dict[str, _Lazy]:
    files = [
        path for path in folder.iterdir() if re.search(rf"mp_rank_{rank:02d}_(model|optim)_states\.pt$", path.name)
    ]
    if not files:
        raise InputError(f"{folder}: no files of tensor rank {rank}")
    if not any(path.name.endswith("optim_states.pt") for path in files):
        # ZeRO-0, which is fp32: the model file holds the weights as they are.
        (model_file,) = files
        content: dict[str, Any] = torch.load(model_file, map_location="cpu", mmap=True, weights_only=False)
        return content["module"]

    with tempfile.TemporaryDirectory() as view:
        for path in files:
            (Path(view) / path.name).symlink_to(path.resolve())
        # Its progress bars and prints say nothing to a user of this package.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            return get_fp32_state_dict_from_zero_checkpoint(view, tag=".", lazy_mode=True)
