"""The parts of Megatron-core that this package uses, and an import of it that takes half of its time.

Trap: while it is imported, Megatron-core decorates functions of its own with ``torch.compile``, which loads the whole
compiler, and loads wandb and TensorBoard if they are installed. None of what it decorates is used here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def _uncompiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``torch.compile``, which decorates with and without arguments, that compiles nothing."""
    return function if function is not None else lambda decorated: decorated


@contextmanager
def _light() -> Iterator[None]:
    absent = dict.fromkeys({"wandb", "torch.utils.tensorboard"} - sys.modules.keys())
    with mock.patch.object(torch, "compile", _uncompiled):
        sys.modules |= absent  # type: ignore[arg-type]
        try:
            yield
        finally:
            for name in absent:
                del sys.modules[name]


with _light():
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "set_tensor_model_parallel_attributes",
]
