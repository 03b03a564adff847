"""Ranks that see, want or can do different things, as on different hosts."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecp_scale.checkpoint.folder import CheckpointRecord, complete_checkpoints
from ecp_scale.cluster.lock import Lock
from ecp_scale.cluster.ranks import adopt_launcher, first_host
from ecp_scale.command_line import parse
from ecp_scale.errors import InputError
from ecp_scale.training.loop import train
from tests.corpus import ShardedText
from tests.launching import ROOT, command, environment, free_port, metrics, run, run_successfully
from tests.parallel.layouts import Layout

SCRIPT = "launch/pretrain_ecp.py"
ODD = "tests/training/odd_rank.py"


def options(text: ShardedText, output: Path | str, *more: str) -> list[str]:
    """A short run of two ranks."""
    words = Layout(data=2, zero=1).options(text, Path(output))
    return [*map(str, words), "--training.steps=4", "--checkpoint.every_steps=2", *more]


def odd_launch(
    what: str, *words: str, folder: Path | None = None, extra: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """A launch whose rank 1 is odd."""
    start = command(ODD, 2, (what, *words), "alone")
    return subprocess.run(
        start, cwd=folder, env={**environment(), **(extra or {})}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def saved(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that has ended with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_successfully(SCRIPT, *options(sharded_text, folder), ranks=2)
    return folder


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("config", ("optimizer.learning_rate is 0.002 on rank 0", "0.123 on rank 1", "training.seed is 1 on rank 0")),
        ("code", ("code of ecp_scale is ", f"{'f' * 16} on rank 1")),
        ("shards", ("rank 1: corpus ", "for the first rank 197,050 with")),
    ],
)
def test_ranks_that_differ_are_named_before_any_step(
    what: str, expected: tuple[str, ...], sharded_text: ShardedText, tmp_path: Path
) -> None:
    done = odd_launch(what, *options(sharded_text, tmp_path / "run"))
    assert done.returncode != 0
    for text in (*expected, socket.gethostname()):
        assert text in done.stderr, done.stderr[-3000:]
    assert 'odd_rank.py", line' not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rank_whose_kernel_hangs_is_named_by_the_pass_that_it_is_in(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    done = odd_launch("hung", *options(sharded_text, tmp_path / "run", "--parallel.timeout_seconds=16"))
    assert done.returncode != 0
    # Each step of the layout has two micro-batches, which ranks reduce together in the second's backward pass.
    named = f"rank 1 of 2 on host {socket.gethostname()} has done forward pass 1 of step 1, for "
    assert f"stopped: {named}" in done.stderr, done.stderr[-3000:]
    assert "where another has done forward pass 2 of step 1, for " in done.stderr


def test_a_run_folder_that_a_host_does_not_share_is_refused(sharded_text: ShardedText, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    words = [word for word in options(sharded_text, "run") if "output_dir" not in word]
    done = odd_launch(
        "folder",
        *words,
        "--training.output_dir=run",
        folder=tmp_path / "one",
        extra={"OTHER_FOLDER": str(tmp_path / "other")},
    )
    assert done.returncode != 0
    assert "rank 1: training.output_dir" in done.stderr
    assert "expected one that all hosts share" in done.stderr
    assert not list((tmp_path / "one" / "run").glob("checkpoints/*"))


def test_a_stale_view_of_one_rank_changes_no_decision(saved: Path, sharded_text: ShardedText, tmp_path: Path) -> None:
    words = options(sharded_text, tmp_path / "run")
    shutil.copytree(saved, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    done = odd_launch("stale", *words, "--resume=auto", "--training.steps=6", "--allow-rate-jump")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    record = CheckpointRecord.read(complete_checkpoints(tmp_path / "run")[-1])
    assert record.step == 6
    assert sum(name.endswith("_optim_states.pt") for name in record.files) == 2


@pytest.mark.parametrize(
    ("what", "rank", "expected"),
    [
        # Neither may resume from an older state, nor train on without a word.
        ("stale", "0", "step-00000004 is seen on host"),
        ("hidden", "1", "rank 1: "),
        ("cache", "1", "zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged"),
    ],
)
def test_a_checkpoint_that_a_rank_does_not_see_as_it_is_ends_the_resume_on_all(
    what: str, rank: str, expected: str, saved: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = options(sharded_text, tmp_path / "run")
    shutil.copytree(saved, tmp_path / "run")
    done = odd_launch(
        what, *words, "--resume=auto", "--training.steps=6", "--allow-rate-jump", extra={"ODD_RANK": rank}
    )
    assert done.returncode != 0
    assert expected in done.stderr, done.stderr[-3000:]
    assert 'odd_rank.py", line' not in done.stderr
    assert len(metrics(tmp_path / "run")) == 4


def test_a_rank_that_refuses_before_it_can_tell_the_others_says_so_once_per_host(tmp_path: Path) -> None:
    said = {}
    for local_rank in ("0", "1"):
        place = {"RANK": "9", "LOCAL_RANK": local_rank, "WORLD_SIZE": "16", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        words = [sys.executable, str(ROOT / SCRIPT), "--config", str(tmp_path / "missing.yaml")]
        done = subprocess.run(words, env={**environment(), **place}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        said[local_rank] = done.stderr
    assert said["0"].startswith(f"error on rank 9 on host {socket.gethostname()}: config file {tmp_path}/missing.yaml")
    assert said["1"] == ""


@pytest.mark.parametrize("what", ["a file", "a link to nowhere"])
def test_a_folder_of_checkpoints_that_cannot_be_written_is_found_before_the_first_step(
    what: str, sharded_text: ShardedText, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / "checkpoints"
    if what == "a file":
        place.write_text("")
    else:
        place.symlink_to("/nowhere/at/all")
    with pytest.raises(InputError, match=str(place)):
        train(parse([*options(sharded_text, tmp_path / "run"), "--training.micro_batch_size=1"], ""))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("reaction", "rank"), [("continue", 1), ("stop", 0)])
def test_a_save_that_fails_on_one_rank_leaves_no_checkpoint(
    reaction: str, rank: int, sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = options(sharded_text, tmp_path / "run", f"--checkpoint.on_failed_save={reaction}")
    done = odd_launch("full", *words, extra={"ODD_RANK": str(rank)})
    assert f"rank {rank} on host" in done.stderr
    assert "cannot be written (No space left on device)" in done.stderr
    assert "bytes are free" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    # The last save counts: without it a run is not finished.
    assert done.returncode != 0
    assert "stopped: step" in done.stderr
    assert len(metrics(tmp_path / "run")) == (2 if reaction == "stop" else 4)


def test_a_second_launch_in_a_run_folder_names_the_first(sharded_text: ShardedText, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = Lock(tmp_path / "run" / ".lock")
    lock.take("the test")
    done = run(SCRIPT, *options(sharded_text, tmp_path / "run")[:-1], "--parallel.tensor=1")
    assert done.returncode == 2
    assert f"is being written by process {os.getpid()} on {socket.gethostname()}" in done.stderr
    lock.release()


def test_a_lock_of_a_dead_launch_is_taken_over_and_said(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from ecp_scale.cluster.lock import Lock; "
        "Lock(Path(sys.argv[1])).take('x'); os.kill(os.getpid(), 9)"
    )
    died = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], env=environment())
    assert died.wait() == -signal.SIGKILL
    lock = Lock(tmp_path / ".lock")
    assert str(lock.take("y")).startswith(f"process {died.pid} on ")
    lock.release()
    assert Lock(tmp_path / ".lock").take("z") is None


def test_tasks_of_srun_are_ranks_of_one_launch(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / SCRIPT), *options(sharded_text, tmp_path / "run")]
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": socket.gethostname(),
        "SLURM_JOB_ID": "4711",
        "MASTER_PORT": str(free_port()),
        "MASTER_ADDR": "127.0.0.1",
    }
    tasks = [
        subprocess.Popen(
            words,
            env={**environment(), **shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=240)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 ranks on 1 host" in outputs[0]
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[003-010,12],login1", "node003"),
        ("a[5,7]-ib,b2", "a5-ib"),
        ("node1,node2", "node1"),
        ("gpu-1-[2-3]", "gpu-1-2"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_batch_script_or_a_single_task_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    adopt_launcher()
    assert "RANK" not in os.environ
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    adopt_launcher()
    assert "RANK" not in os.environ


def test_a_port_in_use_is_named_at_once(sharded_text: ShardedText, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        began = time.monotonic()
        words = [sys.executable, str(ROOT / SCRIPT), *options(sharded_text, tmp_path / "run")]
        place = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = subprocess.run(words, env={**environment(), **place}, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert f"error: port {port} of host 127.0.0.1 is in use" in done.stderr
    assert time.monotonic() - began < 120  # of 600 that a rank would wait


def test_a_moved_run_folder_is_not_started_afresh_elsewhere(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = [word for word in options(sharded_text, tmp_path / "run") if not word.startswith("--parallel.")]
    run_successfully(SCRIPT, *words)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    config = tmp_path / "moved" / "config.yaml"
    done = run(SCRIPT, "--config", config, "--resume=auto")
    assert done.returncode == 2
    assert f"pass --training.output_dir {tmp_path / 'moved'}" in done.stderr
    assert not (tmp_path / "run").exists()
