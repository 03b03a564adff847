"""Launches of pretrain_ecp.py: ranks that share the work against one process on one core, and the time to start.

Every rank computes with one thread, so a perfect pair of ranks makes twice the tokens per second of one.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ecp_scale
from benchmarks.timing import alternate, medians
from ecp_scale.command_line import to_yaml
from ecp_scale.config import Config
from ecp_scale.planning.rehearsal import torchrun, write_text_of_package
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.training.metrics import read_metrics

ROOT = Path(ecp_scale.__file__).parent.parent
STEPS = 5
ONE = "1 process"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    ONE: (1, []),
    "tensor 2": (2, ["--parallel.tensor=2"]),
    "context 2": (2, ["--parallel.context=2"]),
    "data 2": (2, ["--training.global_batch_size=2"]),
}
"""Ranks of each, and what is said on its command line."""


def compare(config: Config, rounds: int) -> dict[str, Any]:
    """Tokens per second of each layout, how many times those of one process, and how long each takes to start."""
    speeds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    starts: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(to_yaml(config))
        preprocess([str(write_text_of_package(folder))], "byte", str(folder / "shards"))
        for number in range(rounds):
            for layout, (ranks, words) in LAYOUTS.items():
                run = folder / f"{layout}-{number}".replace(" ", "-")
                start, speed = _launch(folder, run, ranks, words)
                speeds[layout].append(speed)
                starts[layout].append(start)
    times = {
        layout: statistics.median(mine / alone for mine, alone in zip(found, speeds[ONE], strict=True))
        for layout, found in speeds.items()
    }
    return {
        layout: {
            "tokens_per_second": speed,
            "times_one_process": times[layout],
            "seconds_from_launch_to_first_step": medians(starts)[layout],
        }
        for layout, speed in medians(speeds).items()
    }


def _launch(folder: Path, run: Path, ranks: int, options: list[str]) -> tuple[float, float]:
    """Seconds from the launch until the first step begins, and the median speed of the later steps."""
    words = [*torchrun(ranks), str(ROOT / "launch/pretrain_ecp.py")]
    words += [f"--deepspeed_config={ROOT / 'ds_configs/zero0.json'}"]
    words += [f"--config={folder / 'run.yaml'}", f"--data.prefix={folder / 'shards'}", *options]
    words += [f"--training.output_dir={run}", f"--training.steps={STEPS}"]
    began = time.time()
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    speed = statistics.median(record["tokens_per_second"] for record in read_metrics(run)[1:])
    return (run / "config.yaml").stat().st_mtime - began, speed  # which is written right before the first step


def start_up(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds until --help has answered, and until the libraries of a training run are imported."""
    programs = {
        "--help": [str(ROOT / "launch/pretrain_ecp.py"), "--help"],
        "import of torch": ["-c", "import torch"],
        "import of torch, deepspeed, megatron.core": ["-c", "import torch, deepspeed, megatron.core.tensor_parallel"],
        "import of the training loop": ["-c", "import ecp_scale.training.loop"],
    }
    runs = {
        name: partial(subprocess.run, [sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
        for name, words in programs.items()
    }
    seconds = alternate(runs, rounds)
    return {name: {"seconds": middle} for name, middle in medians(seconds).items()}
