"""A model that is used, not trained, by the ranks of a launch: they share its matrices, and the text that it reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from ecp_scale.cluster.ranks import Ranks, adopt_launcher
from ecp_scale.config import ModelConfig, ParallelConfig
from ecp_scale.errors import InputError
from ecp_scale.evaluation.perplexity import Text
from ecp_scale.evaluation.texts import Spool
from ecp_scale.parallel.groups import Groups, agreed, decided, process_groups

SENT_IDS = 1 << 22
"""Ids of a text that travel in one message."""


@contextmanager
def launched(config: ModelConfig, tensor: int | None) -> Iterator[Groups]:
    """Join the launch, which may be of this process alone.

    Args:
        config: of the model.
        tensor: ranks that share every matrix; None takes all of the launch.

    Raises:
        InputError: if so many ranks cannot share this model.
    """
    adopt_launcher()
    ranks = Ranks.from_environment().world_size
    if tensor is not None and (tensor < 1 or ranks % tensor):
        raise InputError(f"--parallel.tensor {tensor}: the launch has {ranks} ranks, expected a multiple of it")
    parallel = ParallelConfig(tensor=ranks if tensor is None else tensor)
    problems = parallel.problems(config, ranks)
    if problems:
        raise InputError("\n".join(problems))
    with process_groups(parallel) as groups:
        yield groups


def from_first_rank(read: Callable[[], Text], groups: Groups) -> Text:
    """The text that the first rank reads, on all ranks of the launch; only it needs the file.

    Raises:
        InputError: on all ranks, if it cannot be read.
    """
    text = agreed(lambda: read() if dist.get_rank() == 0 else None, takes_long=True)
    if dist.get_world_size() == 1:
        assert text is not None
        return text
    told = decided(lambda: (replace(text, ids=text.ids[:0]), len(text.ids)) if text is not None else None)
    assert told is not None
    sizes, count = told
    spool = Spool()
    for start in range(0, count, SENT_IDS):
        block = torch.empty(min(SENT_IDS, count - start), dtype=torch.int32)
        if text is not None:
            block = torch.from_numpy(text.ids[start : start + len(block)].astype("int32"))
        block = block.to(groups.device)
        dist.broadcast(block, src=0)
        if text is None:
            spool.add(block.cpu().numpy())
    return text or replace(sizes, ids=spool.ids())
