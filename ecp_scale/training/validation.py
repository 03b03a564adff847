"""Validation: the loss of every corpus that is set aside, in bits per byte and by position in a window."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ecp_scale.config import TrainingConfig
from ecp_scale.data.batches import validation_batches
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.marks import NO_MASK, LossMask, plain
from ecp_scale.models.positions import bucket_of, buckets
from ecp_scale.parallel.device import to_device
from ecp_scale.parallel.groups import Groups
from ecp_scale.zero.engine import Engine


@torch.no_grad()
def losses_by_position(
    engine: Engine, batches: Iterable[tuple[Tensor, int]], groups: Groups, mask: LossMask = NO_MASK
) -> Tensor:
    """Sums of losses in nats, and numbers of targets, over all ranks' batches, by bucket of positions (2, buckets).

    Args:
        engine: whose model computes them.
        batches: of this rank, (micro, n + 1), and how many of their first rows count; as many on every rank.
        groups: this rank's process groups.
        mask: which targets have no loss.
    """
    engine.eval()
    totals = None
    for batch, counted in batches:
        if totals is None:
            n = batch.shape[1] - 1
            totals = torch.zeros(2, len(buckets(n)), dtype=torch.float64, device=groups.device)
            # Those of this rank: of a context group each holds a run, a latent model trains the last ones.
            positions = engine.module.trained_targets(torch.arange(n)[None])[0].tolist()
            places = torch.tensor([bucket_of(position) for position in positions], device=groups.device)
        marked = to_device(batch, groups.device)
        ids = plain(marked)
        _, losses = engine(ids[:, :-1], ids[:, 1:], on_host=plain(batch)[:, :-1])
        trained = mask.of(engine.module.trained_targets(marked[:, 1:]))[:counted]
        summed = losses[:counted].double().masked_fill(~trained, 0).sum(0)
        totals.index_add_(1, places, torch.stack((summed, trained.sum(0).double())))
    engine.train()
    assert totals is not None
    dist.all_reduce(totals, group=groups.data)
    return totals


def mean_loss(engine: Engine, batches: Iterable[tuple[Tensor, int]], groups: Groups, mask: LossMask = NO_MASK) -> float:
    """Mean loss in nats per trained target; see ``losses_by_position``."""
    return _mean(losses_by_position(engine, batches, groups, mask))


def validation_numbers(
    engine: Engine, corpora: Mapping[str, Corpus], config: TrainingConfig, groups: Groups, mask: LossMask
) -> dict[str, Any]:
    """What metrics.jsonl says of each corpus by name; of the one without a name, under the bare keys.

    ``validation_loss`` is in nats per target. ``validation_bits_per_byte`` takes the corpus's tokens per byte, and is
    not there for shards with marks; those with labels have ``validation_accuracy`` in its place and in that of what
    follows. ``validation_by_position`` holds [first, last, loss] of buckets of positions.
    """
    replicas = groups.replicas
    found: dict[str, Any] = {}
    for name, corpus in corpora.items():
        shares = validation_batches(corpus, config, replicas.size(), replicas.rank())
        end = f"/{name}" if name else ""
        if corpus.manifest.labels:
            found[f"validation_loss{end}"], found[f"validation_accuracy{end}"] = of_labels(engine, shares, groups)
            continue
        totals = losses_by_position(engine, shares, groups, mask)
        found[f"validation_loss{end}"] = loss = _mean(totals)
        counts = corpus.manifest.totals
        if not corpus.manifest.marked:
            found[f"validation_bits_per_byte{end}"] = loss * counts.tokens / (math.log(2) * max(1, counts.bytes))
        found[f"validation_by_position{end}"] = [
            [*bucket, nll / count]
            for bucket, nll, count in zip(buckets(corpus.sequence_length), *totals.tolist(), strict=True)
            if count
        ]
    return found


@torch.no_grad()
def of_labels(engine: Engine, batches: Iterable[tuple[Tensor, int]], groups: Groups) -> tuple[float, float]:
    """A classifier's mean loss in nats and share of right labels, over all ranks' batches.

    Args:
        engine: whose model classifies.
        batches: of this rank, (micro, n + 1), and how many of their first rows count; as many on every rank.
        groups: this rank's process groups.
    """
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=groups.device)
    for batch, counted in batches:
        ids = to_device(batch, groups.device)
        scores, labels = engine(ids[:, :-1])[:counted, -1].float(), ids[:counted, -1]
        loss = cross_entropy(scores, labels, reduction="sum") if counted else totals.new_zeros(())
        totals += torch.stack((loss, (scores.argmax(-1) == labels).sum(), torch.tensor(counted, device=groups.device)))
    engine.train()
    dist.all_reduce(totals, group=groups.data)
    loss, right, count = totals.tolist()
    return loss / max(1, count), right / max(1, count)


def _mean(totals: Tensor) -> float:
    losses, counts = totals.sum(1)
    return (losses / counts.clamp(min=1)).item()
