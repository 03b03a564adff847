"""The gradient of what several linears take, summed inside their products."""

import torch
from torch import Tensor


def backward_pass() -> int:
    """Number of the backward pass that is under way in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


class GradientSum:
    """The gradient of the positions (n * b, D), to which linears add their terms; autograd is given it at the end."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._so_far: Tensor | None = None  # wider where products are
        self._pass = -1

    def add(self, gradient: Tensor, weight: Tensor) -> None:
        """Add (n, b, out) @ (out, D); the product reads and writes the sum, which no other kernel does."""
        self._begin_anew()
        flat = gradient.flatten(0, -2)
        if self._so_far is None:
            self._so_far = flat @ weight
        else:
            torch.addmm(self._so_far, flat, weight, out=self._so_far)

    def take(self, others: Tensor | None, shape: torch.Size) -> Tensor:
        """With what autograd has summed itself, in ``shape``."""
        self._begin_anew()
        found, self._so_far = self._so_far, None
        if found is None:
            assert others is not None
            return others
        whole = found.view(shape).to(self.dtype)
        return whole if others is None else whole.add_(others)

    def _begin_anew(self) -> None:
        """Drop what another backward pass has left, one that wanted gradients of weights alone."""
        if (this := backward_pass()) != self._pass:
            self._so_far, self._pass = None, this
