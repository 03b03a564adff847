"""The loss of fixed tokens, which is saved with the weights, and looked at when a run goes on."""

import dataclasses

from ecp_scale.checkpoint.hugging_face import NOT_THEIRS
from ecp_scale.checkpoint.resuming import Start
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.models.probe import is_same, probe_ids
from ecp_scale.parallel.groups import Groups
from ecp_scale.training.validation import mean_loss
from ecp_scale.zero.engine import Engine

FREE = (*NOT_THEIRS, "dropout")
"""Fields of the model's config that change nothing that the probe sees."""


def probe_loss(engine: Engine, config: Config, groups: Groups) -> float:
    """Mean loss of the probe's tokens, the same on all ranks, which all take part."""
    # In the shape of a micro-batch, for which the model may be compiled.
    batch = probe_ids(config.model).expand(config.training.micro_batch_size, -1)
    return mean_loss(engine, [(batch, 1)], groups)


def check_probe(start: Start, config: Config, engine: Engine, groups: Groups) -> None:
    """Say whether the model, once loaded, computes what it did when it was saved; all ranks take part."""
    record = start.record
    if record is None or not record.digests:
        return
    says = groups.data_rank == groups.tensor_rank == 0
    before, then, now = record.probe_loss, dict(record.model), dataclasses.asdict(config.model)
    if before is None or {**then, **dict.fromkeys(FREE, 0)} != {**now, **dict.fromkeys(FREE, 0)}:
        if says:
            say("loaded      all digests are those that were saved; the probe is of another geometry")
        return
    found = probe_loss(engine, config, groups)
    if not says:
        return
    if is_same(found, before, config.training.precision, record.precision):
        say(f"loaded      all digests are those that were saved; the probe's loss is {found:.4f}, {before:.4f} then")
    else:
        say(
            f"TRAP        the weights are those that were saved, but the probe's loss is {found:.4f}, {before:.4f} "
            "then: this version, its libraries or this device compute something else"
        )
