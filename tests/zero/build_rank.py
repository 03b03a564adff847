"""Build one rank's part of a preset in a launch that is played: python -m tests.zero.build_rank PRESET RANKS STAGE.

Prints its parameters, the bytes of the weights that it holds, and by how much its process has grown at its peak.
"""

import json
import resource
import sys
import time

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ecp_scale.command_line import parse
from ecp_scale.models.initialization import initialize
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import process_groups
from ecp_scale.precision import weight_type
from ecp_scale.zero import json_config
from ecp_scale.zero.making import held_weight, make_model


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    preset, ranks, stage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    words = ["--config", preset, "--deepspeed_config", f"zero{stage}", "--data.prefix=none", *sys.argv[4:]]
    request = parse([*words, "--training.output_dir=none"], "", world_size=ranks)
    config = request.config
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with process_groups(config.parallel) as groups:
        settings = json_config.resolve(request.deepspeed, config, ranks)
        before, began = peak_bytes(), time.perf_counter()
        parallel = ParallelContext.of(config, groups, weight_type(config))
        model = make_model(config, parallel, settings, groups.device)
        initialize(model, config.model, parallel, config.training.seed, held_weight)
        seconds = time.perf_counter() - began
        held = [held_weight(parameter).values for parameter in model.parameters()]
        print(
            json.dumps(
                {
                    "parameters": config.model.parameters,
                    "held_bytes": sum(values.nbytes for values in held),
                    "grown_bytes": peak_bytes() - before,
                    "seconds": seconds,
                }
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
