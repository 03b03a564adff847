"""Token shards as a dataset of torch, for loops that are not ours."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ecp_scale.data.corpus import Corpus


class TokenDataset(Dataset[Tensor]):
    """Windows of a corpus, in order: item i is (n + 1) int64 ids, of which the first n are read and the last n targets.

    Where the shards mark tokens without a loss, their ids are complements: ``ecp_scale.data.marks`` parts the two.
    A training run shuffles them with ``ecp_scale.data.order.SampleOrder``; a DataLoader may do so in its own way.

    Args:
        prefix: of the shards that ``ecp-preprocess`` wrote.
        sequence_length: n.

    Raises:
        InputError: naming the file that is missing or damaged.
    """

    def __init__(self, prefix: str, sequence_length: int) -> None:
        self.corpus = Corpus(prefix, sequence_length)

    def __len__(self) -> int:
        return self.corpus.windows

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < len(self):
            raise IndexError(f"window {number}, expected 0 to {len(self) - 1}")
        return torch.from_numpy(self.corpus.window(number))
