"""Requests to stop: signals to ranks, a launcher that is gone, and the recipe for Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.cluster.signals import ECHO_SECONDS, SIGNALS, STOP, STOPPED, StopRequest
from tests.corpus import ShardedText
from tests.launching import ROOT, command, environment, free_port
from tests.parallel.layouts import Layout
from tests.training.test_runs import rank_of, start_until, steps_done

SCRIPT = "launch/pretrain_ecp.py"


def options(text: ShardedText, output: Path, ranks: int = 2) -> list[str]:
    """A run that does not end by itself."""
    words = map(str, Layout(data=ranks, zero=1).options(text, output))
    return [*(word for word in words if "validation" not in word), "--training.steps=100000", "--resume=auto"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive)])
def test_a_signal_to_a_rank_saves_and_stops_all(
    number: signal.Signals, sharded_text: ShardedText, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = command(SCRIPT, 2, options(sharded_text, output), launcher="torchrun")
    process = start_until(words, lambda: steps_done(output) >= 3)
    rank_of(process, 1).send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    stopped = json.loads((output / STOPPED).read_text())
    done = steps_done(output)
    assert stopped["reason"] == number.name
    assert stopped["step"] == done
    assert stopped["checkpoint"] == str(find_checkpoint(output))
    assert find_checkpoint(output).name == f"step-{done:08d}"
    assert f"stopped by {number.name} after step {done:,}" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.exhaustive)])
def test_ranks_whose_deepspeed_launcher_is_gone_save_and_stop(
    number: signal.Signals, sharded_text: ShardedText, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start_until(command(SCRIPT, 2, options(sharded_text, output)), lambda: steps_done(output) >= 3)
    ranks = [rank_of(process, rank) for rank in range(2)]
    process.send_signal(number)
    process.wait(timeout=60)
    _, left = psutil.wait_procs(ranks, timeout=30)
    assert left == []
    done = steps_done(output)
    assert find_checkpoint(output).name == f"step-{done:08d}"
    assert json.loads((output / STOPPED).read_text())["step"] == done


def test_a_second_signal_of_a_kind_ends_at_once_and_an_echo_does_not() -> None:
    code = (
        "import os, signal, sys, time\n"
        "from ecp_scale.cluster.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    for number in map(int, sys.argv[2:]):\n"
        "        os.kill(os.getpid(), number)\n"
        "        time.sleep(float(sys.argv[1]))\n"
        "    print(stop.reason)\n"
    )

    def end(pause: float, *numbers: int, rank: int = 0) -> tuple[int, str, list[str]]:
        words = [sys.executable, "-c", code, str(pause), *map(str, numbers)]
        variables = environment() | {"RANK": str(rank)}
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout.strip(), done.stderr.splitlines()

    again = ECHO_SECONDS + 0.2
    said, interrupted = (
        f"{name:11} ends the run after the step in progress, saved; a second {name} ends it at once"
        for name in ("SIGTERM", "SIGINT")
    )
    last = "SIGTERM     again: the run ends at once, not saved"
    assert end(again, signal.SIGTERM, signal.SIGTERM) == (-signal.SIGTERM, "", [said, last])
    assert end(again, signal.SIGTERM, signal.SIGTERM, rank=1) == (-signal.SIGTERM, "", [])
    assert end(0.01, signal.SIGTERM, signal.SIGTERM) == (0, "SIGTERM", [said])
    assert end(again, signal.SIGINT, signal.SIGTERM) == (0, "SIGINT", [interrupted, said])


def test_a_signal_after_an_error_promises_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(ZeroDivisionError), stop:
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGTERM)  # as a launcher does whose ranks fail
    assert stop.reason == "SIGTERM"
    for number, handler in before.items():
        signal.signal(number, handler)
    assert capfd.readouterr().err == ""


def test_a_stop_during_a_save_trains_no_further_step(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ecp_scale.checkpoint.saving import Progress, Saves
    from ecp_scale.command_line import parse
    from ecp_scale.training import loop

    begin = Saves.begin

    def interrupted(saves: Saves, done: Progress, probe_loss: float | None = None) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        begin(saves, done, probe_loss)

    monkeypatch.setattr(Saves, "begin", interrupted)
    output = tmp_path / "run"
    loop.train(parse([*options(sharded_text, output, ranks=1), "--checkpoint.every_steps=3"], ""))
    assert steps_done(output) == 3
    assert json.loads((output / STOPPED).read_text())["step"] == 3


def test_a_file_in_the_run_folder_stops_the_run(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ecp_scale.checkpoint.saving import Progress, Saves
    from ecp_scale.command_line import parse
    from ecp_scale.training import loop

    begin, output = Saves.begin, tmp_path / "run"

    def touched(saves: Saves, done: Progress, probe_loss: float | None = None) -> None:
        (output / STOP).touch()
        begin(saves, done, probe_loss)

    monkeypatch.setattr(Saves, "begin", touched)
    words = [*options(sharded_text, output, ranks=1), "--checkpoint.every_steps=3"]
    loop.train(parse(words, ""))
    assert steps_done(output) == 3
    assert json.loads((output / STOPPED).read_text())["reason"] == "the file stop"
    loop.train(parse(words, ""))  # an old file does not stop the next launch
    assert steps_done(output) == 6


def test_a_save_that_the_launcher_would_cut_short_is_said(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ecp_scale.command_line import parse
    from ecp_scale.training import checkpoints, loop

    monkeypatch.setattr(checkpoints, "LAUNCHER_SECONDS", 0.0)
    for launcher, expected in (("torchrun", 0), ("deepspeed", 1)):
        if launcher == "deepspeed":
            monkeypatch.setenv("CROSS_RANK", "0")
        output = tmp_path / launcher
        loop.train(parse([*options(sharded_text, output, ranks=1), "--training.steps=1"], ""))
        assert capsys.readouterr().err.count(f"to stop, touch {output / STOP}") == expected


def test_a_signal_while_libraries_are_loaded_is_a_stop(sharded_text: ShardedText, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = command(SCRIPT, 1, options(sharded_text, output, ranks=1))
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "loading libraries" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads((output / STOPPED).read_text())["step"] == 0
    assert steps_done(output) == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_heard_and_its_handler_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) == before


FAKE_SRUN = """#!{python}
import os, socket, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith(("--kill", "--cpus"))]
shared = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": "{port}"}}
tasks = [
    subprocess.Popen(words, env={{**os.environ, **shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(2)
]
open("{folder}/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def test_the_recipe_for_slurm_queues_again_after_a_stop_and_not_after_an_end_or_a_crash(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    output, tools = tmp_path / "run", tmp_path / "bin"
    tools.mkdir()
    fake = FAKE_SRUN.format(python=sys.executable, port=free_port(), folder=tmp_path)
    (tools / "srun").write_text(fake)
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queued\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    variables = {
        **environment(),
        "PATH": f"{tools}:{os.environ['PATH']}",
        **{"RUN": str(output), "CONFIG": "paper-12l", "PYTHON": sys.executable, "SLURM_JOB_ID": "4711"},
    }
    words = [word for word in options(sharded_text, output) if "output_dir" not in word and "resume" not in word]
    place = words.index("--deepspeed_config")
    job = ["bash", "launch/pretrain_ecp.slurm", *words[:place], *words[place + 2 :]]

    process = subprocess.Popen(job, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while steps_done(output) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():  # as --signal does: to the tasks, not to the script
        os.kill(int(task), signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "queued").read_text() == "requeue 4711\n"
    done = steps_done(output)

    ended = subprocess.run(
        [*job, f"--training.steps={done + 2}", "--allow-rate-jump"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "resumed from" in ended.stderr
    assert steps_done(output) == done + 2
    assert not (output / STOPPED).exists()
    refused = subprocess.run([*job, "--model.heads=4"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert refused.returncode == 2
    assert (tmp_path / "queued").read_text() == "requeue 4711\n"


def test_a_signal_that_whoever_started_us_ignores_stays_ignored() -> None:
    code = (
        "import os, signal\n"
        "from ecp_scale.cluster.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(stop.reason)\n"
    )
    words = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "None")
