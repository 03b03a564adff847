"""Muon for the matrices of the blocks, AdamW for all else, whatever part of them a rank holds.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal one, about, for which it needs the whole matrix. Under tensor parallelism a rank has a share of it, and under
ZeRO-1 and -2 a run of all shares one after another, with a matrix cut at each end. So the ranks that have parts of one
tell each other its momentum, each makes whole matrices orthogonal, and keeps what belongs to its part. torch's and
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


class Matrix(NamedTuple):
    """This tensor rank's share of a matrix; ``start`` is its place among those of the group, one after another."""

    shape: torch.Size
    partition_dim: int | None
    start: int

    def ranks(self, length: int) -> range:
        """Ranks that have a part of it, where each has a run of ``length`` elements of the group."""
        return range(self.start // length, (self.start + self.shape.numel() - 1) // length + 1)

    def part(self, rank: int, length: int) -> slice:
        """The elements of it in the run of a rank, by their numbers in it; of none, an empty slice."""
        low, high = (min(max(rank * length + at - self.start, 0), self.shape.numel()) for at in (0, length))
        return slice(low, high)


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
        self._in_a_row = matrices_of(groups)
        parameters = (value for group in groups if group.orthogonal for value in group.parameters.values())
        self._alone = {
            value: matrix._replace(start=0) for value, matrix in zip(parameters, self._in_a_row, strict=True)
        }

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
            matrices, rank, wholes = [self._alone[stored]], 0, {}
        else:
            matrices, rank = self._in_a_row, self._ranks.data.rank()
            wholes = exchanged(wanted, matrices, self._ranks.data)
        length, flat = stored.numel(), stored.view(-1)
        for matrix in matrices:
            if rank not in matrix.ranks(length):
                continue
            part, first = matrix.part(rank, length), matrix.start - rank * length
            mine = slice(first + part.start, first + part.stop)
            share = wholes[matrix] if matrix in wholes else wanted[mine]
            update = self._orthogonal_share(share.view(matrix.shape), matrix.partition_dim).reshape(-1)
            flat[mine].add_(update[part], alpha=-rate)

    def _orthogonal_share(self, share: Tensor, partition_dim: int | None) -> Tensor:
        """This rank's share of the whole matrix's update, scaled."""
        group = self._ranks.tensor
        if partition_dim is None or group.size() == 1:
            return orthogonal(share).mul_(_scale(share.shape))
        shares = [torch.empty_like(share) for _ in range(group.size())]
        dist.all_gather(shares, share.contiguous(), group=group)
        whole = torch.cat(shares, dim=partition_dim)
        return orthogonal(whole).mul_(_scale(whole.shape)).chunk(group.size(), partition_dim)[group.rank()]


def exchanged(mine: Tensor, matrices: Sequence[Matrix], group: ProcessGroup) -> dict[Matrix, Tensor]:
    """The matrices that this rank has a part of and others too, whole and flat; all ranks of the group take part.

    Args:
        mine: this rank's run of all matrices, one after another; as long on every rank.
        matrices: in their order.
        group: ranks that have the runs, in order.
    """
    rank, length = group.rank(), len(mine)
    cut = [matrix for matrix in matrices if len(matrix.ranks(length)) > 1]
    if not cut:
        return {}
    wholes = {matrix: mine.new_empty(matrix.shape.numel()) for matrix in cut if rank in matrix.ranks(length)}
    parts = {}
    for matrix, whole in wholes.items():
        place = matrix.part(rank, length)
        first = matrix.start - rank * length
        parts[matrix] = whole[place] = mine[first + place.start : first + place.stop]
    shared = [[matrix for matrix in wholes if other in matrix.ranks(length)] for other in range(group.size())]
    shared[rank] = []
    sent = [parts[matrix] for some in shared for matrix in some]
    sizes_sent = [sum(len(parts[matrix]) for matrix in some) for some in shared]
    places = [[matrix.part(other, length) for matrix in some] for other, some in enumerate(shared)]
    sizes = [sum(place.stop - place.start for place in some) for some in places]
    received = mine.new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent) if sent else mine[:0], sizes, sizes_sent, group=group)
    begin = 0
    for matrix, place in zip(itertools.chain(*shared), itertools.chain(*places), strict=True):
        end = begin + place.stop - place.start
        wholes[matrix][place] = received[begin:end]
        begin = end
    return wholes


def busiest(matrices: Sequence[Matrix], length: int, ranks: int) -> tuple[int, int]:
    """Elements that a rank sends at most in a step: to ranks of the data group, and to its tensor group."""
    to_data, to_tensor = [0] * ranks, [0] * ranks
    for matrix in matrices:
        holders = matrix.ranks(length)
        for rank in holders:
            part = matrix.part(rank, length)
            to_data[rank] += (part.stop - part.start) * (len(holders) - 1)
            to_tensor[rank] += matrix.shape.numel() * (matrix.partition_dim is not None)
    return max(to_data), max(to_tensor)


def _scale(shape: Sequence[int]) -> float:
    return 0.2 * max(shape) ** 0.5


def matrices_of(groups: Sequence[OptimizerGroup]) -> list[Matrix]:
    """What Muon updates, in the order of the optimizer."""
    found, start = [], 0
    for parameter in (value for group in groups if group.orthogonal for value in group.parameters.values()):
        found.append(Matrix(parameter.shape, Partition.of(parameter).partition_dim, start))
        start += parameter.numel()
    return found
