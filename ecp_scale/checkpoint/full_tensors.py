"""Full fp32 tensors out of a checkpoint of any layout: weights, and what the optimizer remembers of each.

Each tensor-parallel rank's part of a parameter comes from DeepSpeed's files (``ecp_scale.zero.partitions``), and the
parts are merged by what the parameters said of themselves when the checkpoint was written. (DeepSpeed's own converter
refuses checkpoints with tensor parallelism, mistaking the files of other ranks for leftovers.) Files are mapped into
memory, so that no more than one parameter is held at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ecp_scale.checkpoint.folder import CheckpointRecord
from ecp_scale.errors import InputError
from ecp_scale.zero.partitions import STEP, WEIGHT, ParameterStates, join_runs, read_runs


def full_weights(folder: Path, record: CheckpointRecord) -> Iterator[tuple[str, Tensor]]:
    """Name and full weight (fp32, no padding of the vocabulary) of every parameter, one at a time.

    Args:
        folder: a complete checkpoint.
        record: its record.

    Raises:
        InputError: if the files disagree with each other or with the record.
    """
    return ((name, states[WEIGHT]) for name, states in full_states(folder, record, None))


def full_states(
    folder: Path, record: CheckpointRecord, optimizer_order: Sequence[str] | None
) -> Iterator[tuple[str, ParameterStates]]:
    """Name, full weight and full optimizer states (fp32, no padding) of every parameter, one at a time.

    Args:
        folder: a complete checkpoint.
        record: its record.
        optimizer_order: names of all parameters in the order in which the optimizer has them, by which ZeRO-0
            numbers its states; None leaves those out.

    Raises:
        InputError: if the files disagree with each other or with the record.
    """
    shares = [read_runs(folder, rank, optimizer_order) for rank in range(record.tensor_parallel)]
    for rank, (runs, _) in enumerate(shares):
        if set(runs) != set(record.partitions):
            odd = ", ".join(sorted(set(runs) ^ set(record.partitions)))
            raise InputError(f"{folder}: tensor rank {rank} and the record disagree about {odd}")
    for name, partition in record.partitions.items():
        try:
            joined = [join_runs(runs[name], shapes[name]) for runs, shapes in shares]
            whole = {
                key: tensor if key == STEP else partition.merge([share[key] for share in joined])
                for key, tensor in joined[0].items()
            }
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: parameter {name}: {error}") from error
        yield name, whole
