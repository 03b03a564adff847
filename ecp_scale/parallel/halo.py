"""Context parallelism by halo: of a sequence that ranks hold in runs of segments, a segment needs its left neighbour.

Per layer a rank sends the keys and values of its last segment one step to the right, and receives those that its first
segment needs; in the backward pass their gradient returns the same way. The message is one segment, whatever the length
of the sequence and the number of ranks (arXiv 2412.06106, section 3).

Both directions are in flight while the rank computes segments that do not need them: the forward message from before
the first segment to after the last but one, the backward message likewise, since autograd runs in reverse order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ecp_scale.parallel.recompute import PASS


class Halo:
    """Gives a tensor (..., positions, width) to the rank on the right and takes that of the rank on the left."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        rank, size = group.rank(), group.size()
        self.left = dist.get_global_rank(group, rank - 1) if rank > 0 else None
        self.right = dist.get_global_rank(group, rank + 1) if rank < size - 1 else None

    def __call__(self, message: Tensor) -> Callable[[], Tensor]:
        """Send ``message`` on its way; what is returned waits for the one from the left.

        The first rank receives one without positions, so that its part of the graph is that of the others.
        """
        transfer = _Transfer(self, message.shape)
        ticket = _Send.apply(message, transfer)
        return lambda: _Receive.apply(ticket, transfer)


class _Transfer:
    """One message to the right and one from the left, and their gradients the other way."""

    def __init__(self, halo: Halo, shape: torch.Size) -> None:
        self.halo = halo
        self.shape = shape
        self.pending: list[dist.Work] = []
        self.kept: list[Tensor] = []
        self.incoming: Tensor

    def start(self, outgoing: Tensor, receiver: int | None, sender: int | None) -> None:
        """Begin to send to ``receiver`` and to receive from ``sender``; from nobody come no positions."""
        outgoing = outgoing.contiguous()
        *heads, positions, width = self.shape
        self.incoming = outgoing.new_empty(*heads, positions if sender is not None else 0, width)
        operations = []
        if receiver is not None:
            operations.append(dist.P2POp(dist.isend, outgoing, receiver, self.halo.group))
        if sender is not None:
            operations.append(dist.P2POp(dist.irecv, self.incoming, sender, self.halo.group))
        self.kept = [outgoing]  # until it is sent
        self.pending = dist.batch_isend_irecv(operations) if operations else []

    def finish(self) -> Tensor:
        """Wait for both."""
        for work in self.pending:
            work.wait()
        incoming = self.incoming
        del self.incoming
        self.pending, self.kept = [], []
        return incoming


class _Send(torch.autograd.Function):
    """Forward: the message goes to the right. Backward: its gradient has come from there."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        halo = transfer.halo
        this = PASS.get()
        if this.which == "again":
            transfer.incoming = this.received.popleft()
        else:
            transfer.start(message, halo.right, halo.left)
        return message.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *ticket: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.transfer.finish()
        # Nobody to the right of the last rank has used its last segment.
        shape = ctx.transfer.shape
        return (gradient if gradient.shape == shape else gradient.new_zeros(shape)), None


class _Receive(torch.autograd.Function):
    """Forward: the message from the left is here. Backward: its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        received = transfer.finish()
        this = PASS.get()
        if this.which == "first":
            this.received.append(received.detach())
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        halo = ctx.transfer.halo
        ctx.transfer.start(gradient, halo.left, halo.right)
        return gradient.new_empty(0), None
