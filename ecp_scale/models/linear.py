"""Megatron-core's parallel layers as this package uses them: (n, b, width) activations, one tensor out.

Every parameter says how it is shared, by the attributes that Megatron-core and DeepSpeed read:
``tensor_model_parallel`` and ``partition_dim``. Weights are left empty here; ``ecp_scale.models.initialization``
fills them.
"""

from dataclasses import dataclass

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Shard:
    """This rank's share of the model: the group that splits every matrix, and the type of the weights."""

    group: ProcessGroup
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """Number of shares."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank's share."""
        return self.group.rank()

    @property
    def megatron(self) -> ModelParallelConfig:
        """What Megatron-core's layers want to know."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            params_dtype=self.dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
        )


def _empty(weight: Tensor) -> Tensor:
    return weight


def shared_by_heads(parameter: Tensor, group: ProcessGroup) -> Tensor:
    """A replicated parameter for use on this rank's heads alone.

    Trap: its gradient there is the share of the local heads. The copy's backward sums the shares over the group;
    without that the replicas of the parameter drift apart in silence.
    """
    return copy_to_tensor_model_parallel_region(parameter, group=group)


class ColumnLinear(ColumnParallelLinear):
    """Linear whose outputs are split over the tensor group: (n, b, in) -> (n, b, out/t)."""

    # Megatron's value is None, and DeepSpeed's checkpoint converters stumble over it.
    get_extra_state = nn.Module.get_extra_state

    def __init__(self, inputs: int, outputs: int, bias: bool, shard: Shard) -> None:
        super().__init__(inputs, outputs, bias=bias, config=shard.megatron, init_method=_empty, tp_group=shard.group)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local rows."""
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """Linear whose inputs are split over the tensor group: (n, b, in/t) -> (n, b, out), summed over the group."""

    get_extra_state = nn.Module.get_extra_state

    def __init__(self, inputs: int, outputs: int, bias: bool, shard: Shard) -> None:
        super().__init__(
            inputs,
            outputs,
            bias=bias,
            config=shard.megatron,
            init_method=_empty,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=shard.group,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local columns and sum over the group."""
        # Trap: Megatron sums input.contiguous() in place and returns the input, so a strided one would stay local.
        return super().forward(x.contiguous())[0]


class Embedding(VocabParallelEmbedding):
    """Token embedding whose rows are split over the tensor group: (n, b) -> (n, b, D)."""

    def __init__(self, padded_vocab: int, width: int, shard: Shard) -> None:
        super().__init__(padded_vocab, width, config=shard.megatron, init_method=_empty, tp_group=shard.group)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
