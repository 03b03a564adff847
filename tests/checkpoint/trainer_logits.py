"""Run by ``test_conversion``: resume a run on its ranks and write the logits that the trainer itself computes."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ecp_scale import deepspeed_json
from ecp_scale.checkpoint.saving import resume
from ecp_scale.command_line import parse
from ecp_scale.data.corpus import Corpus
from ecp_scale.parallel.groups import process_groups
from ecp_scale.training.engine import build_engine


def main() -> None:
    """Arguments: token file, output file, then the options of the run."""
    local_rank, tokens_file, output_file, *options = sys.argv[1:]
    request = parse([local_rank, *options], "")
    config = request.config
    assert config.data.prefix is not None
    assert config.training.output_dir is not None
    with process_groups(config.parallel) as groups:
        settings = deepspeed_json.resolve(request.deepspeed, config, request.world_size)
        engine = build_engine(config, settings, groups)
        corpus = Corpus(config.data.prefix, config.model.sequence_length)
        assert resume(engine, config, corpus, Path(config.training.output_dir)) > 0
        engine.eval()
        with torch.no_grad():
            logits = engine.module.logits(torch.from_numpy(np.load(tokens_file)))
        if dist.get_rank() == 0:
            np.save(output_file, logits.float().cpu().numpy())


if __name__ == "__main__":
    main()
