"""A launch whose launcher starts ranks again goes on by itself, also on the hosts that are left; failures are named."""

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from ecp_scale.cluster.meeting import Meeting
from ecp_scale.cluster.ranks import Process
from ecp_scale.cluster.signals import START_AGAIN, StopRequest
from ecp_scale.command_line import parse
from ecp_scale.planning.rehearsal import torchrun
from ecp_scale.training.loop import train
from tests.cluster.nodes import Node, nodes, why_not
from tests.cluster.rehearsal import DISTURBANCES, FAILURES, STRUCK_AT, Launch, disturb, script, strike
from tests.corpus import ShardedText
from tests.launching import ROOT, environment, free_port, metrics

STEPS = 20
LONG = 250
"""Steps of a run that outlasts what befalls it."""


@pytest.fixture(scope="module")
def undisturbed(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run in one process that nothing befalls."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(parse([str(word) for word in script(sharded_text.prefix, run, STEPS)[1:]], ""))
    return losses(run)


def losses(run: Path) -> list[float]:
    """Of every step."""
    return [record["loss"] for record in metrics(run)]


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[list[Node]]:
    """Pretended hosts, as many as a test asks for."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with nodes(request.param) as found:
        yield found


def test_ranks_that_are_started_again_go_on_with_the_run(
    undisturbed: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    path, *rest = map(str, script(sharded_text.prefix, run, STEPS))
    with out.open("w") as log:
        launch = subprocess.Popen([*words, str(ROOT / path), *rest], env=environment(), stdout=log, stderr=log)
    here = Launch([], tmp_path, "")
    here.wait_until(lambda: here.steps_done() >= STRUCK_AT)
    victims = subprocess.run(["pgrep", "-P", str(launch.pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-KILL", victims[-1]], check=True)
    assert launch.wait(timeout=240) == 0, out.read_text()[-3000:]
    text = out.read_text()
    assert "stopped: rank " in text
    assert "resumed from" in text
    assert f"evidence    the last messages of the ranks: {run / 'logs' / 'flight_recorder_'}*" in text
    (left,) = (run / "logs").glob("flight_recorder_*")
    assert json.loads((run / "alive.json").read_text())["step"] == STEPS
    entries = pickle.loads(left.read_bytes())["entries"]
    assert "all_reduce" in {entry["profiling_name"].rpartition(":")[2] for entry in entries}
    assert losses(run) == pytest.approx(undisturbed, abs=1e-5)


def log_of_a_launch_that_loses_its_last_host(launch: Launch) -> str:
    """What the first host has said when the others have gone on to the end."""
    launch.wait_until(lambda: launch.steps_done() >= STRUCK_AT)
    launch.hosts[-1].kill()
    launch.wait_until(lambda: launch.agents[0].poll() is not None, seconds=300)
    first = launch.log(launch.hosts[0]).read_text()
    assert launch.agents[0].returncode == 0, first[-3000:]
    return first


@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_launch_goes_on_with_the_hosts_that_are_left(
    hosts: list[Node], undisturbed: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    launch = Launch(hosts, tmp_path, sharded_text.prefix, nnodes="2:3", restarts=1)
    launch.start(ranks=1, steps=STEPS)
    first = log_of_a_launch_that_loses_its_last_host(launch)
    assert "stopped: rank 2 of 3 on host ecp-node2 sent no heartbeat for 20 s" in first
    assert "layout      2 ranks on 2 hosts (ecp-node0, ecp-node1)" in first
    assert losses(launch.run) == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [4], indirect=True)
def test_a_launch_of_eight_ranks_goes_on_with_six(hosts: list[Node], sharded_text: ShardedText, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    train(parse([str(word) for word in script(sharded_text.prefix, alone, STEPS, batch=24)[1:]], ""))
    launch = Launch(hosts, tmp_path, sharded_text.prefix, nnodes="3:4", restarts=1)
    launch.start(ranks=2, steps=STEPS, batch=24)
    first = log_of_a_launch_that_loses_its_last_host(launch)
    assert "layout      6 ranks on 3 hosts (ecp-node0, ecp-node1, ecp-node2)" in first
    assert losses(launch.run) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_launch_goes_on_without_its_first_rank(
    hosts: list[Node], undisturbed: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    launch = Launch(hosts, tmp_path, sharded_text.prefix, nnodes="2:3", restarts=1, endpoint=2)
    launch.start(ranks=1, steps=STEPS)
    launch.wait_until(lambda: launch.steps_done() >= STRUCK_AT)
    first = launch.rank(0).environ()["MASTER_ADDR"]
    lost = next(host for host in hosts if host.address == first)
    assert lost.number != 2
    lost.kill()
    launch.wait_until(lambda: launch.agents[2].poll() is not None, seconds=300)
    assert launch.agents[2].returncode == 0, launch.log(hosts[2]).read_text()[-3000:]
    assert losses(launch.run) == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_host_is_drained_and_comes_back(
    hosts: list[Node], sharded_text: ShardedText, tmp_path: Path, undisturbed: list[float]
) -> None:
    launch = Launch(hosts, tmp_path, sharded_text.prefix, nnodes="2:3", restarts=3)
    launch.start(ranks=1, steps=LONG)
    launch.wait_until(lambda: launch.steps_done() >= STRUCK_AT)
    launch.agents[2].send_signal(signal.SIGTERM)
    launch.wait_until(lambda: "layout      2 ranks on 2 hosts" in launch.log(hosts[0]).read_text(), seconds=120)
    assert launch.agents[2].wait(60) == 1  # torchrun's, whatever its ranks said
    drained = launch.steps_done()
    launch.wait_until(lambda: launch.steps_done() >= drained + 5)
    launch.agents[2] = hosts[2].torchrun("2:3", 1, 3, script(launch.prefix, launch.run, LONG), launch.log(hosts[2]))
    said = launch.log(hosts[0])
    launch.wait_until(lambda: said.read_text().count("layout      3 ranks on 3 hosts") == 2, seconds=120)
    assert [agent.wait(240) for agent in launch.agents] == [0, 0, 0], said.read_text()[-3000:]
    assert losses(launch.run)[:STEPS] == pytest.approx(undisturbed, abs=1e-5)
    assert [record["step"] for record in metrics(launch.run)] == list(range(1, LONG + 1))


def test_ranks_that_were_not_asked_to_end_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_code(rank: int, signalled: list[bool], restarts: str = "3") -> int:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank % 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        stop = StopRequest()
        stop.told(signalled)
        return stop.exit_code

    drained = [False, False, True, False]
    assert [exit_code(rank, drained) for rank in range(4)] == [START_AGAIN, START_AGAIN, 0, 0]
    assert [exit_code(rank, drained, restarts="0") for rank in range(4)] == [0] * 4
    assert [exit_code(rank, [False] * 4) for rank in range(4)] == [0] * 4  # a file, which is for the whole run
    assert [exit_code(rank, [True] * 4) for rank in range(4)] == [0] * 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_deepspeed_starts_ranks_on_the_hosts_of_a_hostfile(
    hosts: list[Node], undisturbed: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    launch = Launch(hosts, tmp_path, sharded_text.prefix)
    began = launch.start_by_deepspeed(ranks=1, steps=STEPS)
    assert began.wait(240) == 0, launch.log(hosts[0]).read_text()[-3000:]
    assert losses(launch.run) == pytest.approx(undisturbed, abs=1e-5)
    assert "layout      2 ranks on 2 hosts (ecp-node0, ecp-node1)" in launch.log(hosts[0]).read_text()

    again = launch.start_by_deepspeed(ranks=1, steps=LONG)
    launch.wait_until(lambda: launch.steps_done() >= STEPS + STRUCK_AT)
    launch.rank(1).kill()
    launch.wait_until(launch.have_stopped)
    again.wait(60)
    text = launch.log(hosts[0]).read_text()
    assert "stopped: rank 1 of 2 on host ecp-node1" in text, text[-3000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_host_that_never_comes_is_named(hosts: list[Node], sharded_text: ShardedText, tmp_path: Path) -> None:
    hosts[1].cut()
    launch = Launch(hosts, tmp_path, sharded_text.prefix)
    began = time.monotonic()
    started = launch.start_by_deepspeed(ranks=2, steps=STEPS)
    assert started.wait(180) != 0
    assert time.monotonic() - began < 120
    text = launch.log(hosts[0]).read_text()
    assert "the launch waits for rank 2, 3 of 4 (host ecp-node1)" in text, text[-3000:]
    assert "rank 2, 3 of 4 (host ecp-node1) did not come within parallel.timeout_seconds = 40" in text


def test_a_host_whose_clock_is_off_trains_with_the_others(
    undisturbed: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    path, *rest = script(sharded_text.prefix, tmp_path / "run", STEPS)
    words = [*torchrun(2), ROOT / "tests" / "odd_host.py", "clock", 1, ROOT / str(path), *rest]
    done = subprocess.run([str(word) for word in words], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 hosts (host0, host1)" in done.stderr
    assert losses(tmp_path / "run") == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [2], indirect=True)
@pytest.mark.parametrize("failure", FAILURES)
def test_all_ranks_stop_and_say_why(failure: str, hosts: list[Node], sharded_text: ShardedText, tmp_path: Path) -> None:
    launch = Launch(hosts, tmp_path, sharded_text.prefix)
    seconds, lost = strike(launch, FAILURES[failure])
    assert seconds < 90
    assert lost <= 6
    assert any(line.startswith("stopped") and "ecp-node" in line for line in launch.said())


@pytest.mark.exhaustive
@pytest.mark.parametrize("hosts", [2], indirect=True)
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_what_passes_is_waited_for(
    disturbance: str, hosts: list[Node], sharded_text: ShardedText, tmp_path: Path
) -> None:
    try:
        disturb(Launch(hosts, tmp_path, sharded_text.prefix), DISTURBANCES[disturbance])
    except NotImplementedError as error:
        pytest.skip(str(error))


def meeting(port: int, rank: int, size: int) -> Meeting:
    """One rank's, on a store that a launcher serves."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, multi_tenant=True)
    here = Process.this()
    return Meeting(store, rank, size, Process(f"host{rank // 2}", here.pid, here.started))


def come(ranks: list[Meeting], seconds: float = 30) -> list[bool]:
    """Whether each of some ranks, which come at once, has met the others."""
    found = [False] * len(ranks)

    def one(number: int) -> None:
        found[number] = ranks[number].come(time.monotonic() + seconds, lambda left: None, heartbeat="1")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_attempt_of_a_launch_meets_by_itself() -> None:
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
    first = [meeting(port, rank, 4) for rank in range(4)]
    assert come(first) == [True] * 4
    assert [sorted(one.local) for one in first] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    first[0].store.set("lost", "rank 3")
    # One that is early for the next attempt finds the last one, and must wait for the first rank.
    early, late = [meeting(port, rank, 3) for rank in (1, 2)], meeting(port, 0, 3)
    threads = [threading.Thread(target=come, args=([one],)) for one in early]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert come([late]) == [True]
    for thread in threads:
        thread.join()
    assert [one.attempt for one in (*early, late)] == [2, 2, 2]
    assert not late.store.check(["lost"])
    assert late.name(2) == "rank 2 of 3 on host host1"
    del agent


@pytest.mark.parametrize("size", [2, 4])
def test_one_that_is_early_for_more_or_fewer_ranks_does_not_join_those_before(size: int) -> None:
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
    assert come([meeting(port, rank, 3) for rank in range(3)]) == [True] * 3
    straggler = meeting(port, 2, 3)  # of those before, which has not been told to end yet
    early = meeting(port, size - 1, size)
    threads = [threading.Thread(target=come, args=([one], 12)) for one in (straggler, early)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert come([meeting(port, rank, size) for rank in range(size - 1)]) == [True] * (size - 1)
    for thread in threads:
        thread.join()
    assert sorted(early.local) == [rank for rank in range(size) if rank // 2 == (size - 1) // 2]
    assert not straggler.local
    del agent


SERVE = """
import sys, time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("serves", flush=True)
time.sleep(99)
"""
MEET = """
from ecp_scale.cluster.heartbeat import FailureDetector
from ecp_scale.cluster.ranks import Ranks
FailureDetector(Ranks(1, 0, 2), 10).wait_for_all()
"""


def test_a_store_that_goes_dark_while_ranks_meet_is_named() -> None:
    port = str(free_port())
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with subprocess.Popen([sys.executable, "-c", SERVE, port], stdout=subprocess.PIPE, env=environment()) as server:
        assert server.stdout is not None
        server.stdout.readline()
        words = [sys.executable, "-c", MEET]
        rank = subprocess.Popen(words, env=environment() | where, stderr=subprocess.PIPE, text=True)
        time.sleep(8)  # it waits for the first rank
        server.send_signal(signal.SIGSTOP)
        try:
            _, errors = rank.communicate(timeout=60)
        finally:
            server.kill()
            rank.kill()
    assert rank.returncode == 1
    assert "stopped: rank 0 on host 127.0.0.1: its store has not answered for 1" in errors


def test_an_attempt_that_never_met_is_not_completed_by_the_next_one() -> None:
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
    assert come([meeting(port, rank, 2) for rank in (0,)], seconds=1) == [False]
    early = meeting(port, 1, 2)
    thread = threading.Thread(target=come, args=([early],))
    thread.start()
    time.sleep(1)
    late = meeting(port, 0, 2)
    assert come([late]) == [True]
    thread.join()
    assert (early.attempt, late.attempt) == (2, 2)
    early.store.wait(["met"], timedelta(seconds=1))
    del agent
