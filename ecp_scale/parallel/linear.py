"""Tensor-parallel linears and the embedding, on Megatron-core's: (n, b, width) activations, one tensor out.

A branch of the residual block enters the tensor-parallel region once (``ecp_scale.parallel.branch``), passes a
column-parallel and a row-parallel linear, and leaves it with the latter. Outside, every rank of the group
holds all positions, or with sequence parallelism its part of them (arXiv 2205.05198).

Every parameter says how it is partitioned, by the attributes that Megatron-core and DeepSpeed read:
``tensor_model_parallel`` and ``partition_dim``. Weights are left empty here; ``ecp_scale.models.initialization``
fills them.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.megatron import (
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
from ecp_scale.parallel.recompute import recomputed
from ecp_scale.precision import linear, product_type


def _empty(weight: Tensor) -> Tensor:
    return weight


# Trap: without torch.distributed Megatron-core's functions forget their group, even one of a single rank.


def gather_to_tensor_parallel_region(x: Tensor, parallel: ParallelContext) -> Tensor:
    """All positions for this rank's rows of the matrices: (n or n/t, b, D) -> (n, b, D); gradients are summed back."""
    if parallel.tp_size == 1:
        return x
    if parallel.sequence_parallel:
        return gather_from_sequence_parallel_region(x, group=parallel.tp_group)
    return copy_to_tensor_model_parallel_region(x, group=parallel.tp_group)


def reduce_from_tensor_parallel_region(x: Tensor, parallel: ParallelContext) -> Tensor:
    """The sum over the group of what its ranks computed: (n, b, D) -> (n or n/t, b, D)."""
    # Trap: Megatron sums input.contiguous() in place and returns the input, so a strided one would stay local.
    assert x.is_contiguous()
    if parallel.tp_size == 1:
        return x
    if parallel.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(x, group=parallel.tp_group)
    return reduce_from_tensor_model_parallel_region(x, group=parallel.tp_group)


def gather_from_tensor_parallel_region(x: Tensor, parallel: ParallelContext) -> Tensor:
    """The outputs of a column-parallel linear from all ranks of the group: (..., out/t) -> (..., out)."""
    return x if parallel.tp_size == 1 else gather_from_tensor_model_parallel_region(x, group=parallel.tp_group)


def with_summed_gradient(parameter: Tensor, group: ProcessGroup | None) -> Tensor:
    """A replicated parameter for use on this rank's heads or positions alone; None where all ranks use it on the same.

    Trap: its gradient there is the part of the local heads or positions. The copy's backward sums the parts over the
    group; without that the replicas of the parameter drift apart in silence. DeepSpeed does not do it.
    """
    if group is None or group.size() == 1:
        return parameter
    return copy_to_tensor_model_parallel_region(parameter, group=group)


class ColumnLinear(ColumnParallelLinear):
    """Linear whose outputs are split over the tensor group: (n, b, in) -> (n, b, out/t)."""

    # Megatron's value is None, and DeepSpeed's checkpoint converters stumble over it.
    get_extra_state = nn.Module.get_extra_state

    def __init__(self, inputs: int, outputs: int, bias: bool, parallel: ParallelContext) -> None:
        super().__init__(
            inputs,
            outputs,
            bias=bias,
            config=parallel.megatron,
            init_method=_empty,
            tp_group=parallel.tp_group,
            disable_grad_reduce=True,  # ``gather_to_tensor_parallel_region`` does it, once for all linears of a branch
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor | None], Tensor] | None = None) -> Tensor:
        """Apply the local rows to all positions, by ``product`` of x and bias where the weight is that of a branch."""
        return linear(x, self.weight, self.bias) if product is None else product(x, self.bias)


class RowLinear(RowParallelLinear):
    """Linear whose inputs are split over the tensor group: (n, b, in/t) -> (n or n/t, b, out), summed over it."""

    get_extra_state = nn.Module.get_extra_state

    def __init__(self, inputs: int, outputs: int, bias: bool, parallel: ParallelContext) -> None:
        super().__init__(
            inputs,
            outputs,
            bias=bias,
            config=parallel.megatron,
            init_method=_empty,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=parallel.tp_group,
        )
        self.parallel = parallel
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
        out = reduce_from_tensor_parallel_region(term, self.parallel)
        return out if self.bias is None else out + self.whole_bias()

    def term(self, x: Tensor) -> Tensor:
        """This rank's term of the sum."""
        return linear(x, self.weight)

    def whole_bias(self) -> Tensor:
        """The bias, for use on the positions that this rank holds."""
        return with_summed_gradient(self.bias, self.parallel.tp_group if self.parallel.sequence_parallel else None)


class Embedding(VocabParallelEmbedding):
    """Token embedding whose rows are split over the tensor group: ids (b, n) -> (n or n/t, b, D)."""

    def __init__(self, padded_vocab: int, width: int, parallel: ParallelContext) -> None:
        super().__init__(
            padded_vocab,
            width,
            config=parallel.megatron,
            init_method=_empty,
            tp_group=parallel.tp_group,
            reduce_scatter_embeddings=parallel.sequence_parallel,
        )
        self.parallel = parallel
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (b, n) -> (n or n/t, b, D)."""
        if self.parallel.tp_size == 1:
            return functional.embedding(tokens.t(), self.weight)
        return super().forward(tokens if self.reduce_scatter_embeddings else tokens.t().contiguous())
