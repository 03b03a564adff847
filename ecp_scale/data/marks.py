"""Tokens that are read but whose prediction has no loss: a prompt before its answer, the filler around a key.

Shards of such texts hold int32 ids, and of a token without a loss its complement, -1 - id. So the mark goes wherever
the token goes: through shards, their hashes, windows and batches, up to the step, which parts the two.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:  # a worker that tokenizes has no use for torch
    from torch import Tensor

Ids = TypeVar("Ids", "Tensor", "np.ndarray[Any, Any]")

MARKED = np.int32
"""Type of the ids of shards with marks."""


def marked(ids: Ids) -> Ids:
    """The same tokens, all without a loss."""
    return ~ids


def plain(ids: Ids) -> Ids:
    """The ids of tokens, marked or not."""
    return (ids >= 0) * ids + (ids < 0) * ~ids


class LossMask(NamedTuple):
    """Which targets have no loss; false where all have one.

    ``ignored_ids`` are ids that never have one; ``marks`` says whether the shards mark any.
    """

    ignored_ids: tuple[int, ...] = ()
    marks: bool = False

    def __bool__(self) -> bool:
        return self.marks or bool(self.ignored_ids)

    def of(self, targets: "Tensor") -> "Tensor":
        """Whether each target, marked or not, has a loss; the same shape."""
        import torch

        ignored = torch.tensor(self.ignored_ids, dtype=targets.dtype, device=targets.device)
        return (targets >= 0) & ~torch.isin(targets, ignored)


NO_MASK = LossMask()
"""Every target has a loss."""
