"""Muon for the matrices of the blocks, AdamW for all else, whatever part of them a rank holds.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal one, about, for which it needs the whole matrix. Under tensor parallelism a rank has a share of it, and under
ZeRO-1 and -2 a run of all shares one after another, with a matrix cut at each end. So ranks tell each other the
momentum of what is cut, each makes whole matrices orthogonal, and keeps what belongs to its part. torch's and
DeepSpeed's own know nothing of the shares of a tensor-parallel matrix.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ecp_scale.config import OptimizerConfig
from ecp_scale.models.parameter_groups import OptimizerGroup
from ecp_scale.parallel.groups import Groups
from ecp_scale.parallel.partition import Partition

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a polynomial of the singular values that takes small ones up fast, and leaves all between about 0.7 and 1.2."""
ITERATIONS = 5
MOMENTUM = "momentum_buffer"
"""Key of its state, as in torch's."""


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix (A, B) with singular values of about 1, by five steps of a Newton-Schulz iteration.

    It is computed in the matrix's type; float32 gives equal curves in all layouts of ranks.
    """
    first, third, fifth = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=third, alpha=fifth), x, beta=first)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class _Matrix(NamedTuple):
    """This tensor rank's share of a matrix, and its place among those of the group, one after another."""

    shape: torch.Size
    partition_dim: int | None
    start: int

    @property
    def stop(self) -> int:
        """The place after its last element."""
        return self.start + self.shape.numel()


class Muon(torch.optim.AdamW):
    """Both as one optimizer, for DeepSpeed to wrap; groups are marked by ``orthogonal``.

    Updates are scaled by 0.2 sqrt(max(A, B)), which makes them as large as AdamW's, so that the learning rate and the
    decay of AdamW serve (arXiv 2502.16982, section 2.2).
    """

    def __init__(self, groups: Sequence[OptimizerGroup], config: OptimizerConfig, ranks: Groups) -> None:
        """Take the parameters before DeepSpeed lays them one after another.

        Args:
            groups: of ``optimizer_groups``.
            config: of the optimizer.
            ranks: that share matrices and their states.
        """
        super().__init__(
            [
                {
                    "params": list(group.parameters.values()),
                    "weight_decay": config.weight_decay if group.decays else 0.0,
                    "orthogonal": group.orthogonal,
                    "momentum": config.momentum,
                }
                for group in groups
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self._ranks = ranks
        matrices = [value for group in groups if group.orthogonal for value in group.parameters.values()]
        starts = itertools.accumulate((value.numel() for value in matrices), initial=0)
        self._alone = {value: _Matrix(value.shape, _partition_dim(value), 0) for value in matrices}
        self._in_a_row = [
            _Matrix(value.shape, _partition_dim(value), start) for value, start in zip(matrices, starts, strict=False)
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights, by the gradients that they have."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["orthogonal"]]
            if self.param_groups:  # ZeRO updates one group at a time
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                for stored in group["params"]:
                    self._update(stored, group)

    def _update(self, stored: Tensor, group: dict[str, Any]) -> None:
        """Update what the optimizer holds as one tensor: a matrix, or under ZeRO this rank's run of all of them."""
        gradient, rate = stored.grad, group["lr"]
        assert gradient is not None
        state = self.state[stored]
        if MOMENTUM not in state:
            # AdamW, when it is loaded, looks for a step in every state.
            state |= {"step": torch.zeros((), device=stored.device), MOMENTUM: torch.zeros_like(stored)}
        state["step"] += 1
        state[MOMENTUM].mul_(group["momentum"]).add_(gradient)
        wanted = gradient.add(state[MOMENTUM], alpha=group["momentum"]).view(-1)  # Nesterov's
        stored.mul_(1 - rate * group["weight_decay"])
        if isinstance(stored, nn.Parameter) and stored in self._alone:
            matrices, ranks, first = [self._alone[stored]], None, 0
        else:
            matrices, ranks = self._in_a_row, self._ranks.data
            first = ranks.rank() * stored.numel()
        length, flat = stored.numel(), stored.view(-1)
        for matrix in matrices:
            low, high = (min(max(place - first, 0), length) for place in (matrix.start, matrix.stop))
            share = wanted[low:high]
            if ranks is not None and matrix.start // length != (matrix.stop - 1) // length:
                share = _joined(share, matrix.shape.numel(), first + low - matrix.start, ranks)
            if low < high:
                update = self._orthogonal_share(share.view(matrix.shape), matrix.partition_dim).reshape(-1)
                mine = update[first + low - matrix.start :][: high - low]
                flat[low:high].add_(mine, alpha=-rate)

    def _orthogonal_share(self, share: Tensor, partition_dim: int | None) -> Tensor:
        """This rank's share of the whole matrix's update, scaled."""
        group = self._ranks.tensor
        if partition_dim is None or group.size() == 1:
            return orthogonal(share).mul_(_scale(share.shape))
        shares = [torch.empty_like(share) for _ in range(group.size())]
        dist.all_gather(shares, share.contiguous(), group=group)
        whole = torch.cat(shares, dim=partition_dim)
        return orthogonal(whole).mul_(_scale(whole.shape)).chunk(group.size(), partition_dim)[group.rank()]


def _joined(part: Tensor, elements: int, start: int, ranks: ProcessGroup) -> Tensor:
    """A tensor of so many elements that ranks have parts of, this one those from ``start`` on."""
    whole = part.new_zeros(elements)
    if len(part):
        whole[start : start + len(part)] = part
    dist.all_reduce(whole, group=ranks)
    return whole


def _scale(shape: Sequence[int]) -> float:
    return 0.2 * max(shape) ** 0.5


def _partition_dim(parameter: nn.Parameter) -> int | None:
    return Partition.of(parameter).partition_dim
