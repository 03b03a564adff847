"""Run by ``tests.parallel.layouts``: train several layouts one after another on the ranks of one launch.

Argument: a JSON file that lists {"options": command line of the run, "probed": ...}. Beside the metrics of a probed run
it leaves trainer_logits.npy, what the engine computes after it has resumed the run's last checkpoint.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ecp_scale.checkpoint.resuming import find_start, load
from ecp_scale.command_line import Request, parse
from ecp_scale.data.blend import Blend
from ecp_scale.parallel.groups import decided, process_groups
from ecp_scale.training.corpora import with_vocabulary
from ecp_scale.training.loop import train
from ecp_scale.zero import json_config
from ecp_scale.zero.engine import build_engine

LOGITS = "trainer_logits.npy"


def probe_tokens() -> torch.Tensor:
    """Token ids (2, 64) whose logits are compared."""
    return torch.from_numpy(np.random.default_rng(1).integers(0, 400, (2, 64)))


def write_logits(request: Request) -> None:
    """Resume as a trainer does, and save what it computes."""
    output = request.config.training.output_dir
    assert output is not None
    with process_groups(request.config.parallel) as groups:
        blend = Blend(request.config.data.phases, request.config.model.sequence_length, request.config.training.seed)
        config = with_vocabulary(request.config, blend.corpora[0])
        settings = json_config.resolve(request.deepspeed, config, request.world_size)
        engine = build_engine(config, settings, groups)
        start = decided(lambda: find_start(Path(output), True, config))
        load(engine, config, start)
        assert start.progress.step == config.training.steps
        engine.eval()
        with torch.no_grad():
            logits = engine.module.logits(probe_tokens())
        if dist.get_rank() == 0:
            np.save(Path(output) / LOGITS, logits.float().numpy())
        engine.destroy()


def main() -> None:
    """Train and probe every run of the list."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        request = parse(job["options"], "")
        train(request)
        if job["probed"]:
            write_logits(request)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
