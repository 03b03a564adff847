"""Launches of the real programs on gloo: one rank with python, several by themselves or with a launcher of users."""

import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

from ecp_scale.planning.rehearsal import torchrun

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 540
PLAYED = {
    *(f"data_tools/{name}.py" for name in ("make_probe", "merge_shards", "preprocess", "show_shards")),
    *(f"data_tools/{name}.py" for name in ("train_tokenizer", "verify_shards")),
    *(f"launch/{name}.py" for name in ("audit_data", "checkpoint", "convert_checkpoint", "generate", "plan", "report")),
}
"""Programs that leave nothing behind in a process, where they are one rank."""
Launcher: TypeAlias = Literal["alone", "deepspeed", "torchrun"]


def command(script: str, ranks: int, options: Sequence[object], launcher: Launcher = "deepspeed") -> list[str]:
    """Words that start a script of this repository on ``ranks`` ranks."""
    if ranks == 1:
        start: list[object] = [sys.executable]
    elif launcher == "alone":
        start = [sys.executable, ROOT / "tests" / "start_ranks.py", ranks, free_port()]
    elif launcher == "torchrun":
        start = [*torchrun(ranks)]
    else:
        start = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks, "--master_port", free_port()]
    return [str(word) for word in [*start, ROOT / script, *options]]


def environment(gpu: bool = False) -> dict[str, str]:
    """The environment of a launch: no ranks of this process, one thread per rank, and a GPU only if asked for."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden_gpus = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **hidden_gpus}


def run(
    script: str,
    *options: object,
    ranks: int = 1,
    timeout: float = TIMEOUT_SECONDS,
    launcher: Launcher = "deepspeed",
    gpu: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end and return its output; what leaves nothing behind is run in this process."""
    if ranks == 1 and script in PLAYED and not gpu:
        return play(script, *options)
    words = command(script, ranks, options, launcher)
    return subprocess.run(words, env=environment(gpu), capture_output=True, text=True, timeout=timeout)


def run_successfully(
    script: str, *options: object, ranks: int = 1, timeout: float = TIMEOUT_SECONDS, gpu: bool = False
) -> str:
    """Run a script that must succeed, without a launcher; return its standard output."""
    done = run(script, *options, ranks=ranks, timeout=timeout, launcher="alone", gpu=gpu)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def play(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    """Run a script of one rank in this process, which has its libraries loaded: a tenth of the time of ``run``.

    For programs that leave nothing behind in a process; what C code prints is not in the output.
    """
    words = [str(word) for word in (ROOT / script, *options)]
    out, errors = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(errors),
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ, environment(), clear=True),
    ):
        try:
            runpy.run_path(words[0], run_name="__main__")
            code: object = 0
        except SystemExit as error:
            code = error.code
    return subprocess.CompletedProcess(words, int(str(code or 0)), out.getvalue(), errors.getvalue())


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Records of a run."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    """A port that nobody serves, below those that Linux gives to connections, so that none of them takes it first."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")
