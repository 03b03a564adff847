"""How one rank holds its part of a model: the groups that it splits the work with, and the type of its weights."""

from dataclasses import dataclass
from typing import cast

import torch
from torch.distributed import ProcessGroup

from ecp_scale.config import Config, Recompute
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.megatron import ModelParallelConfig


def is_compiled(config: Config, device: torch.device) -> bool:
    """Whether ``training.compile`` has pointwise operations compiled on a device."""
    choice = config.training.compile
    return device.type == "cuda" if choice == "auto" else choice


class SingleRank:
    """Stands for a process group where there is one process, and no torch.distributed."""

    def size(self) -> int:
        """Number of ranks, 1."""
        return 1

    def rank(self) -> int:
        """Number of this rank, 0."""
        return 0


@dataclass(frozen=True)
class ParallelContext:
    """Given to every module of a model. A group of one rank means that the rank holds everything."""

    tp_group: ProcessGroup
    """Ranks that split every matrix (tensor parallelism)."""
    dtype: torch.dtype = torch.float32
    """Type of the weights."""
    sequence_parallel: bool = False
    """Whether the ranks of ``tp_group`` also split the positions between the branches (arXiv 2205.05198)."""
    cp_group: ProcessGroup | None = None
    """Ranks that hold one run of segments each of every sequence; None where each holds all of it."""
    recompute: Recompute = "none"
    """What is computed again in the backward pass instead of being kept."""
    compiled: bool = False
    """Whether pointwise operations go through torch.compile."""

    @classmethod
    def of(cls, config: Config, groups: Groups, dtype: torch.dtype = torch.float32) -> "ParallelContext":
        """The context of a rank of a training run."""
        parallel = config.parallel
        cp_group = groups.context if parallel.context > 1 else None
        compiled = is_compiled(config, groups.device)
        return cls(groups.tensor, dtype, parallel.sequence, cp_group, parallel.recompute, compiled)

    @classmethod
    def single(cls, dtype: torch.dtype = torch.float32) -> "ParallelContext":
        """The context of a model that one process holds alone; needs no torch.distributed."""
        return cls(cast(ProcessGroup, SingleRank()), dtype)

    @property
    def tp_size(self) -> int:
        """Ranks of ``tp_group``."""
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        """This rank's number in ``tp_group``."""
        return self.tp_group.rank()

    @property
    def megatron(self) -> ModelParallelConfig:
        """What Megatron-core's layers take."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tp_size,
            params_dtype=self.dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
