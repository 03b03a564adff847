"""The output layer and its loss, which never holds the scores of all positions at once.

With V in the tens of thousands the scores of a sequence outweigh all of a small model's other activations. Here they
are made for some positions, turned into losses and gradients, and dropped: since the loss is a sum, the gradients are
known but for one factor when the forward pass has seen the targets.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from ecp_scale.models.pointwise import losses_and_gradients, maybe_compile
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.linear import ColumnLinear
from ecp_scale.precision import is_on_a_gpu, linear, product_type

CHUNK_ELEMENTS = {"cpu": 1 << 24, "gpu": 1 << 28}
"""Scores that exist at a time on this rank; as floats 64 MiB and 1 GiB. With fewer, the products with the weights slow
down, and on a GPU each chunk reads and writes the gradient of the weights once more."""
ROWS_OF_A_TILE = 128
"""Of which chunks are multiples, for the tiles of matrix products."""


class OutputLayer(ColumnLinear):
    """Linear to the scores of a vocabulary whose rows are split over the tensor group.

    Args:
        width: D.
        padded: rows of the vocabulary with its padding, over all ranks.
        known: true rows over all ranks; the others have score -inf.
        bias: whether there is one.
        parallel: this rank's share.

    ``z_loss`` is the weight of (log Z)^2 beside every loss that is trained on (PaLM, arXiv 2204.02311, section 5).
    """

    def __init__(self, width: int, padded: int, known: int, bias: bool, parallel: ParallelContext) -> None:
        super().__init__(width, padded, bias, parallel)
        self.z_loss = 0.0
        self.group, self.compiled = parallel.tp_group, parallel.compiled
        self.first_row = parallel.tp_rank * (padded // parallel.tp_size)
        self.rows = min(max(known - self.first_row, 0), padded // parallel.tp_size)
        for parameter in self.parameters():
            parameter.vocabulary_rows = known

    def forward(  # type: ignore[override]
        self, x: Tensor, targets: Tensor | None = None, trained: Tensor | None = None
    ) -> Any:
        """Scores, or with targets their losses.

        Args:
            x: rows (R, B, D) that ``gather_to_tensor_parallel_region`` returned.
            targets: token ids (R, B).
            trained: which of them count (R, B); None means all.

        Returns:
            The scores (R, B, V / t) of this rank's rows. With targets, the sum of the losses of those that count, in
            nats and each with its z-loss, with its gradients; and all losses (R, B) without either.
        """
        if targets is None:
            return _scores(x, self.weight, self.bias, self.rows)
        trained = torch.ones_like(targets, dtype=torch.bool) if trained is None else trained
        place = _Place(self.rows, self.first_row, self.group, self.compiled, self.z_loss)
        return _Loss.apply(x, self.weight, self.bias, targets, trained, place, torch.is_grad_enabled())


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    scores = linear(x, weight, bias)
    scores[..., rows:] = -torch.inf
    return scores


class _Place(NamedTuple):
    """Which rows of the vocabulary this rank holds, with whom, whether there is a compiler, and the z-loss."""

    rows: int
    first_row: int
    group: ProcessGroup
    compiled: bool
    z_loss: float


def chunk_rows(x: Tensor, vocabulary: int) -> int:
    """Rows whose scores of ``vocabulary`` (local) are made at a time."""
    rows = max(1, CHUNK_ELEMENTS["gpu" if is_on_a_gpu(x) else "cpu"] // vocabulary)
    return rows - rows % ROWS_OF_A_TILE if rows > ROWS_OF_A_TILE else rows


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        trained: Tensor,
        place: _Place,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = product_type(x)
        flat, wanted, counts = x.flatten(0, 1).to(wide), targets.flatten(), trained.flatten()
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
        losses = torch.empty(len(flat), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        log_z = torch.empty_like(losses)
        if with_gradients:
            of_x, of_weight = torch.empty_like(flat), torch.zeros_like(weight, dtype=losses.dtype)
            of_bias = None if bias is None else torch.zeros_like(bias, dtype=losses.dtype)
        size = chunk_rows(x, len(weight))
        for start in range(0, len(flat), size):
            chunk = slice(start, start + size)
            gradients = (of_x[chunk], of_weight, of_bias) if with_gradients else None
            rows = (flat[chunk], weight, bias, wanted[chunk], counts[chunk])
            losses[chunk], log_z[chunk] = _losses_of_chunk(*rows, place, gradients)
        if with_gradients:
            ctx.gradients = of_x.view_as(x), of_weight, of_bias
            ctx.dtype = x.dtype
        losses_of_all = losses.view_as(targets)
        ctx.mark_non_differentiable(losses_of_all)
        trained_on = losses + place.z_loss * log_z.square() if place.z_loss else losses
        return trained_on.masked_fill(~counts, 0).sum(), losses_of_all

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factor = of_outputs[0]
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they are of use once
        # Trap: in bf16 the factor itself would be rounded, by up to 0.4 %, and every gradient with it.
        wide = [None if one is None else one.to(torch.promote_types(one.dtype, factor.dtype)) for one in gradients]
        scaled = [None if one is None else one.mul_(factor).to(ctx.dtype) for one in wide]
        return *scaled, None, None, None, None


def _losses_of_chunk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counts: Tensor,
    place: _Place,
    gradients: tuple[Tensor, Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    """Losses and log Z (T,) of rows (T, D). Gradients, if asked for: that of x is written, of weight and bias grow."""
    scores = _scores(x, weight, bias, place.rows)
    if place.compiled and place.group.size() == 1:
        together = maybe_compile(losses_and_gradients, True)
        losses, log_z, of_scores = together(scores, targets, counts, place.z_loss)
    else:
        losses, log_z, of_scores = _losses_and_gradients(scores, targets, counts, place)
    if gradients is not None:
        of_x, of_weight, of_bias = gradients
        rounded = of_scores.to(x.dtype)
        torch.mm(rounded, weight, out=of_x)
        if of_weight.dtype == x.dtype:
            torch.addmm(of_weight, rounded.t(), x, out=of_weight)
        elif x.is_cuda:
            of_weight += torch.mm(rounded.t(), x, out_dtype=of_weight.dtype)  # summed in float32, and never rounded
        else:
            of_weight += rounded.t() @ x
        if of_bias is not None:
            of_bias += of_scores.sum(0, dtype=of_bias.dtype)
    return losses, log_z


def _losses_and_gradients(
    scores: Tensor, targets: Tensor, counts: Tensor, place: _Place
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and log Z (T,), and the gradients of scores (T, V / t), in place of them where the type allows.

    ``losses_and_gradients`` on a vocabulary that ranks share, in as little memory as there is without a compiler.
    """
    rows, first_row, group, _, z_loss = place
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    local = targets - first_row
    mine, row = (local >= 0) & (local < rows), local.clamp(0, max(rows - 1, 0))[:, None]
    top = scores.amax(-1)
    if group.size() > 1:
        dist.all_reduce(top, ReduceOp.MAX, group=group)
    scores -= top[:, None]
    of_target = scores.gather(1, row)[:, 0].masked_fill(~mine, 0)
    scores.exp_()
    sums = torch.stack((of_target, scores.sum(-1)))
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    log_of_sum = sums[1].log()
    log_z = log_of_sum + top
    scores /= sums[1][:, None]
    if z_loss:
        scores *= 1 + 2 * z_loss * log_z[:, None]
    scores.scatter_add_(1, row, -mine[:, None].to(scores.dtype))
    scores *= counts[:, None]
    return log_of_sum - sums[0], log_z, scores
