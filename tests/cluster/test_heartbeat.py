"""A rank that never comes, dies, fails or hangs is named with its host by the others, within the timeout."""

import base64
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil
import pytest

from ecp_scale.cluster.ranks import expected_hosts
from tests.launching import ROOT, environment, free_port

HOST = socket.gethostname()


def start(ranks: Sequence[int], world_size: int, *arguments: object) -> list["subprocess.Popen[str]"]:
    """Start some ranks of a launch as a launcher would."""
    port = str(free_port())
    processes = []
    for rank in ranks:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        told = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [sys.executable, str(ROOT / "tests/cluster/lose_rank.py"), *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, env=environment() | told, stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
    return processes


def stopped(errors: str) -> list[str]:
    """What a rank says of another; torch's own warnings stand around it."""
    assert "Traceback" not in errors
    return [line for line in errors.splitlines() if line.startswith("stopped:")]


def ends(processes: list["subprocess.Popen[str]"], timeout: float) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of every process; all must end in time."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_ranks_meet_and_part() -> None:
    for code, output, errors in ends(start((0, 1, 2), 3, 30, -1, "nothing"), 60):
        assert (code, output, errors) == (0, "together\n", "")


def test_a_rank_that_never_comes_is_named_with_its_host() -> None:
    began = time.monotonic()
    first, second = ends(start((0, 1), 4, 5, -1, "nothing"), 60)
    assert time.monotonic() - began < 30
    assert (first[0], second[0]) == (1, 1)
    expected = f"stopped: rank 2, 3 of 4 (host {HOST}) did not come within parallel.timeout_seconds = 5"
    assert (stopped(first[2]), stopped(second[2])) == ([expected], [])


def test_the_first_rank_is_named_when_its_store_does_not_answer() -> None:
    ((code, _, errors),) = ends(start((1,), 2, 3, -1, "nothing"), 60)
    assert code == 1
    (line,) = stopped(errors)
    assert line.startswith("stopped: rank 0 on host 127.0.0.1 did not answer at port ")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_is_named_with_its_host(lost: int) -> None:
    results = ends(start((0, 1, 2), 3, 300, lost, "killed"), 60)
    speaker = next(rank for rank in range(3) if rank != lost)
    for rank, (code, output, errors) in enumerate(results):
        assert output == "together\n"
        assert code == (-9 if rank == lost else 1)
        if rank == speaker:
            (line,) = stopped(errors)
            assert line.startswith(f"stopped: rank {lost} of 3 on host {HOST} (process ")
            assert line.endswith(" has died")
        else:
            assert not stopped(errors)


def test_the_others_say_what_a_rank_has_stopped_with() -> None:
    first, second, third = ends(start((0, 1, 2), 3, 300, 1, "raises"), 60)
    assert (first[0], second[0], third[0]) == (1, 1, 1)
    assert stopped(first[2]) == [f"stopped: rank 1 of 3 on host {HOST} stopped with ValueError: out of ideas"]
    assert "Traceback" in second[2]
    assert not stopped(third[2])


def test_a_rank_that_hangs_is_named_before_the_collectives_give_up() -> None:
    processes = start((0, 1), 2, 10, 1, "stopped")
    began = time.monotonic()
    try:
        _, errors = processes[0].communicate(timeout=60)
    finally:
        processes[1].kill()
    assert time.monotonic() - began < 40
    assert processes[0].returncode == 1
    assert stopped(errors) == [f"stopped: rank 1 of 2 on host {HOST} sent no heartbeat for 5 s"]


def test_the_first_rank_that_hangs_is_named_though_its_store_hangs_with_it() -> None:
    processes = start((0, 1), 2, 10, 0, "stopped")
    try:
        _, errors = processes[1].communicate(timeout=60)
    finally:
        processes[0].kill()
    assert processes[1].returncode == 1
    (line,) = stopped(errors)
    assert line.startswith(f"stopped: rank 0 of 2 on host {HOST}: its store has not answered for 1")


def test_a_rank_that_hangs_in_a_kernel_is_named_by_where_it_is() -> None:
    processes = start((0, 1, 2), 3, 12, 1, "busy")
    first, _, third = processes
    try:
        _, errors = first.communicate(timeout=90)
        _, of_third = third.communicate(timeout=30)
    finally:
        for process in processes:
            process.kill()
    assert (first.returncode, third.returncode) == (1, 1), of_third
    said = f"rank 1 of 3 on host {HOST} computes step 1, for "
    assert [line for line in errors.splitlines() if line.startswith(f"waiting     {said}")]
    (line,) = stopped(errors)
    assert line.startswith(f"stopped: {said}")
    assert "where another waits for the others in step 1, for " in line


def test_ranks_that_share_a_gpu_are_refused() -> None:
    for rank, (code, _, errors) in enumerate(ends(start((0, 1), 2, 30, -1, "shared"), 60)):
        assert code == 2
        if rank == 0:
            assert "error: ranks share a GPU, expected one each:" in errors
            assert f"rank 0 of 2 on host {HOST}, rank 1 of 2 on host {HOST}: GPU-1" in errors
    assert [code for code, _, _ in ends(start((0, 1), 2, 30, 5, "own"), 60)] == [0, 0]


def test_a_mistake_of_every_rank_keeps_its_traceback() -> None:
    for code, _, errors in ends(start((0, 1), 2, 300, -1, "mistaken"), 60):
        assert code == 1
        assert "torch.ones(2) + torch.ones(3)" in errors
        assert "stopped:" not in errors


def test_hosts_are_known_from_what_the_launcher_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Launcher:
        def cmdline(self) -> list[str]:
            told = base64.urlsafe_b64encode(json.dumps({"node-a": [0, 1], "node-b": [0]}).encode()).decode()
            return ["python", "-m", "deepspeed.launcher.launch", f"--world_info={told}"]

    monkeypatch.setattr(psutil.Process, "parent", lambda self: Launcher())
    assert expected_hosts({}) == {0: "node-a", 1: "node-a", 2: "node-b"}
    assert expected_hosts({1: "a.cluster"}) == {0: "a.cluster", 1: "a.cluster", 2: "node-b"}


def test_hosts_are_known_from_slurm_or_from_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "parent", lambda self: None)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_JOB_NODELIST": "node[1-2]"}.items():
        monkeypatch.setenv(name, value)
    assert expected_hosts({3: "node2"}) == {
        0: "one of node[1-2]",
        1: "one of node[1-2]",
        2: "node2",
        3: "node2",
    }
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    assert expected_hosts({})[0] == "not known"
