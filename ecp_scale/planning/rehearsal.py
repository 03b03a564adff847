"""Two real steps of a narrow copy of a layout on this machine: same groups, features and order of work, small sizes."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ecp_scale
from ecp_scale.command_line import Request, to_yaml
from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.planning.narrow import narrow_model
from ecp_scale.preparation.preprocessing import preprocess

HEAD_WIDTH = 4
SEGMENT = 8
STEPS = 2
REPLICAS = 2
TIMEOUT_SECONDS = 1800


def narrow(config: Config, world_size: int) -> tuple[Config, int]:
    """The copy and its number of ranks: heads and every parallel size stay, but for at most two replicas."""
    parallel = config.parallel
    replicas = min(REPLICAS, parallel.data_parallel_size(world_size))
    model = narrow_model(
        config,
        HEAD_WIDTH,
        SEGMENT,
        layers=min(config.model.layers, 4),
        feed_forward_width=8 * parallel.tensor,
        vocab_size=None,
        vocab_multiple=1,
    )
    batch = config.training.micro_batch_size * replicas * min(2, config.accumulation_steps(world_size))
    training = dataclasses.replace(config.training, global_batch_size=batch, steps=STEPS)
    copy = dataclasses.replace(config, model=model, training=training)
    return copy, parallel.tensor * parallel.context * replicas


def rehearse(request: Request) -> str:
    """Run the copy; what is returned says how it went.

    Raises:
        InputError: if a rank failed, with the end of what it said.
    """
    copy, ranks = narrow(request.config, request.world_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Text that every machine has: the sources of this package.
        preprocess([str(write_text_of_package(folder))], "byte", str(folder / "shards"))
        data = dataclasses.replace(
            copy.data, prefix=str(folder / "shards"), blend=None, validation_prefix=None, validation=None
        )
        training = dataclasses.replace(copy.training, output_dir=str(folder / "run"))
        (folder / "run.yaml").write_text(to_yaml(dataclasses.replace(copy, data=data, training=training)))
        (folder / "deepspeed.json").write_text(json.dumps(request.deepspeed))
        words = [*torchrun(ranks), "--module", "ecp_scale.commands.pretrain", "--config", str(folder / "run.yaml")]
        words += ["--deepspeed_config", str(folder / "deepspeed.json")]
        on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # more ranks than a node has GPUs
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=on_cpu)
        if done.returncode:
            raise InputError(f"the rehearsal on {ranks} ranks failed:\n{done.stderr[-3000:]}")
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = ", ".join(f"{record['loss']:.4f}" for record in records)
    return f"{len(records)} steps on {ranks} ranks, loss {losses}"


def torchrun(ranks: int) -> list[str]:
    """Words that start a script, which is to follow them, on so many ranks of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def write_text_of_package(folder: Path) -> Path:
    """The package's sources as one text file."""
    text = "\n".join(path.read_text() for path in sorted(Path(ecp_scale.__file__).parent.rglob("*.py")))
    (folder / "text.txt").write_text(text)
    return folder / "text.txt"
