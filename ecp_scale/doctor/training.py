"""Two steps of a small model on all ranks, which must then have the same weights."""

import math

import torch
import torch.distributed as dist
import xxhash

from ecp_scale.config import Config, ModelConfig, TrainingConfig
from ecp_scale.doctor.findings import Finding, bad, ok
from ecp_scale.parallel.groups import Groups, everyone
from ecp_scale.training.step import optimizer_step
from ecp_scale.zero import json_config
from ecp_scale.zero.engine import build_engine

STEPS = 2


def train_two_steps(groups: Groups) -> Finding:
    """Train under ZeRO-1, in fp32, with other sequences on every rank, and compare all weights. All ranks call it."""
    ranks = dist.get_world_size()
    model = ModelConfig(
        layers=2, width=64, heads=4, feed_forward_width=128, sequence_length=64, segment_length=16, vocab_size=256
    )
    training = TrainingConfig(global_batch_size=ranks, steps=STEPS, precision="fp32", compile=False)
    config = Config(model=model, training=training)
    settings = json_config.resolve({"zero_optimization": {"stage": 1}}, config, ranks)
    engine = build_engine(config, settings, groups)
    drawn = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        batch = torch.randint(256, (1, 1, 65), generator=drawn)
        loss = optimizer_step(engine, list(batch), groups).loss
    digest = xxhash.xxh3_128()
    for parameter in engine.module.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    engine.destroy()
    digests = everyone(digest.hexdigest())
    others = sum(other != digests[0] for other in digests)
    if others:
        return bad("training", f"after {STEPS} steps {others} of {ranks} ranks have other weights than the first rank")
    if not math.isfinite(loss):
        return bad("training", f"the loss is {loss} after {STEPS} steps")
    return ok("training", f"{STEPS} steps on all ranks, the same weights on each")
