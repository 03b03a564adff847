"""Megatron-core's parallel layers as this package uses them: (n, b, width) activations, one tensor out.

A branch of the residual block enters the tensor-parallel region once, with ``enter``, passes a column-parallel and a
row-parallel linear, and leaves it with the latter. Outside, every rank of the group holds all positions, or with
sequence parallelism its share of them (arXiv 2205.05198).

Every parameter says how it is shared, by the attributes that Megatron-core and DeepSpeed read:
``tensor_model_parallel`` and ``partition_dim``. Weights are left empty here; ``ecp_scale.models.initialization``
fills them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ecp_scale.config import Config, Recompute
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from ecp_scale.parallel.recompute import recomputed
from ecp_scale.precision import linear, product_type


@dataclass(frozen=True)
class Shard:
    """This rank's share of the model: who splits what with it, and how it is held."""

    group: ProcessGroup
    """Ranks that split every matrix."""
    dtype: torch.dtype = torch.float32
    """Type of the weights."""
    sequence: bool = False
    """Whether the ranks of ``group`` also split the positions between the branches (sequence parallelism)."""
    context: ProcessGroup | None = None
    """Ranks that hold one run of segments each of every sequence; None where each holds all of it."""
    recompute: Recompute = "none"
    """What is computed again in the backward pass instead of being kept."""
    compiled: bool = False
    """Whether pointwise operations go through torch.compile."""

    @classmethod
    def of(cls, config: Config, groups: Groups, dtype: torch.dtype = torch.float32) -> "Shard":
        """The share of a rank of a training run."""
        parallel = config.parallel
        context = groups.context if parallel.context > 1 else None
        return cls(groups.tensor, dtype, parallel.sequence, context, parallel.recompute, config.training.compile)

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


def enter(x: Tensor, shard: Shard) -> Tensor:
    """All positions for this rank's rows of the matrices: (n or n/t, b, D) -> (n, b, D); gradients are summed back."""
    if shard.sequence:
        return gather_from_sequence_parallel_region(x, group=shard.group)
    return copy_to_tensor_model_parallel_region(x, group=shard.group)


def leave(x: Tensor, shard: Shard) -> Tensor:
    """The sum over the group of what its ranks computed: (n, b, D) -> (n or n/t, b, D)."""
    # Trap: Megatron sums input.contiguous() in place and returns the input, so a strided one would stay local.
    assert x.is_contiguous()
    if shard.sequence:
        return reduce_scatter_to_sequence_parallel_region(x, group=shard.group)
    return reduce_from_tensor_model_parallel_region(x, group=shard.group)


def summed_gradient(parameter: Tensor, group: ProcessGroup | None) -> Tensor:
    """A replicated parameter for use on this rank's heads or positions alone; None where all ranks use it on the same.

    Trap: its gradient there is the share of the local heads or positions. The copy's backward sums the shares over the
    group; without that the replicas of the parameter drift apart in silence. DeepSpeed does not do it.
    """
    return parameter if group is None else copy_to_tensor_model_parallel_region(parameter, group=group)


class ColumnLinear(ColumnParallelLinear):
    """Linear whose outputs are split over the tensor group: (n, b, in) -> (n, b, out/t)."""

    # Megatron's value is None, and DeepSpeed's checkpoint converters stumble over it.
    get_extra_state = nn.Module.get_extra_state

    def __init__(self, inputs: int, outputs: int, bias: bool, shard: Shard) -> None:
        super().__init__(
            inputs,
            outputs,
            bias=bias,
            config=shard.megatron,
            init_method=_empty,
            tp_group=shard.group,
            disable_grad_reduce=True,  # ``enter`` does it, once for all linears of a branch
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local rows to what ``enter`` returned."""
        return linear(x, self.weight, self.bias)


class RowLinear(RowParallelLinear):
    """Linear whose inputs are split over the tensor group: (n, b, in/t) -> (n or n/t, b, out), summed over it."""

    get_extra_state = nn.Module.get_extra_state

    def __init__(self, inputs: int, outputs: int, bias: bool, shard: Shard) -> None:
        super().__init__(
            inputs,
            outputs,
            bias=bias,
            config=shard.megatron,
            init_method=_empty,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=shard.group,
        )
        self.shard = shard
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, *inputs: Tensor, of: Callable[..., Tensor] | None = None, random: bool = False) -> Tensor:
        """Apply the local columns, sum over the group, add the bias.

        Args:
            inputs: what it is applied to, (n, b, in/t); or the arguments of ``of``.
            of: a cheap function of them. It is computed again in the backward pass, and what it returns is not kept.
            random: whether ``of`` draws random numbers.
        """
        if of is None:
            term = self.term(*inputs)
        elif product_type(self.weight) != self.weight.dtype:
            term = self.term(of(*inputs))  # a product that is widened would be computed again too
        else:
            # In this module's forward, since ZeRO-3 gathers the weight for its forward and its backward alone.
            term = recomputed(lambda *arguments: self.term(of(*arguments)), *inputs, random=random)
        out = leave(term, self.shard)
        return out if self.bias is None else out + self.whole_bias()

    def term(self, x: Tensor) -> Tensor:
        """This rank's term of the sum."""
        return linear(x, self.weight)

    def whole_bias(self) -> Tensor:
        """The bias, for use on the positions that this rank holds."""
        return summed_gradient(self.bias, self.shard.group if self.shard.sequence else None)


class Embedding(VocabParallelEmbedding):
    """Token embedding whose rows are split over the tensor group: ids (b, n) -> (n or n/t, b, D)."""

    def __init__(self, padded_vocab: int, width: int, shard: Shard) -> None:
        super().__init__(
            padded_vocab,
            width,
            config=shard.megatron,
            init_method=_empty,
            tp_group=shard.group,
            reduce_scatter_embeddings=shard.sequence,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up."""
        return super().forward(tokens if self.reduce_scatter_embeddings else tokens.t().contiguous())
