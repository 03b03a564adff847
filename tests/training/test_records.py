"""What a run leaves behind and says: metrics, trackers, lines on the screen."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ecp_scale import console
from ecp_scale.command_line import parse
from ecp_scale.config import Config
from ecp_scale.console import quiet, say, waiting
from ecp_scale.errors import InputError
from ecp_scale.training import trackers
from ecp_scale.training.loop import train
from ecp_scale.training.metrics import FILE, MetricsFile, read_metrics, unreadable_metrics
from ecp_scale.training.trackers import Background, check_trackers, start_trackers, wandb_identity
from tests.corpus import ShardedText
from tests.launching import environment, metrics, run, run_successfully
from tests.parallel.layouts import Layout

ODD = (
    b'{"step": 1, "tokens": 1, "data_digest": "0"}\n\n\x00\x00\n{"step": 2, "tokens": 2, "ledger": "1", "loss": NaN}\n'
    + b"[" * 100_000
    + b'\n\xff\xfe\n[3]\n{"step": 9}\n{"step": 3, "tokens": 3, "data_digest": "2"}\n{"st'
)


def test_records_that_cannot_be_read_are_counted_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_bytes(ODD)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[1]["loss"] is None
    assert unreadable_metrics(tmp_path) == 6
    with MetricsFile(tmp_path, first_step=2) as file:
        file.write({"step": 3, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert "6 lines cannot be read" in capsys.readouterr().err
    assert (tmp_path / f"{FILE}.damaged-1").read_bytes() == ODD
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2] == {"step": 3, "loss": None, "grad_norm": None, "lr": 0.1}
    assert read_metrics(tmp_path / "nowhere") == []


def test_the_record_of_an_earlier_run_is_kept_when_another_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = '{"step": 1, "tokens": 1, "ledger": "0"}\n'
    for number in (1, 2):
        (tmp_path / FILE).write_text(line * number)
        with MetricsFile(tmp_path, first_step=0):
            pass
        assert read_metrics(tmp_path) == []
        assert (tmp_path / f"{FILE}.before-{number}").read_text() == line * number
        assert f"{number} records of an earlier run are kept" in capsys.readouterr().err


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsFile(tmp_path, first_step=0) as file:
        file._file = Path("/dev/full").open("w")  # noqa: SIM115, closed by what it is given to
        for step in (1, 2, 3):
            file.write({"step": step})
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1
    assert "the run goes on without it" in said


def test_the_audit_does_not_blame_the_data_for_a_damaged_record(sharded_text: ShardedText, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(parse([*map(str, Layout(zero=1).options(sharded_text, output)), "--training.steps=5"], ""))
    lines = (output / FILE).read_bytes().splitlines(True)
    (output / FILE).write_bytes(b"".join([lines[0], b"\x00garbage\n", *lines[3:]]))
    audited = run_successfully("launch/audit_data.py", output)
    assert "1 lines of metrics.jsonl cannot be read" in audited
    assert "agrees up to step 5" in audited
    (output / FILE).unlink()
    missing = run("launch/audit_data.py", output)
    assert missing.returncode == 2
    assert "expected metrics.jsonl" in missing.stderr


class Wild:
    """A tracker that fails or hangs."""

    def __init__(self, where: str) -> None:
        self.where = where
        if where == "start":
            raise RuntimeError("no server")

    def log(self, record: dict[str, Any]) -> None:
        """Fail or hang, if it is time to."""
        if self.where == "log":
            raise SystemExit("whatever")
        if self.where == "hang":
            threading.Event().wait(60)

    def finish(self, failed: bool) -> None:
        """Fail, if it is time to."""
        if self.where == "finish":
            raise OSError("gone")


@pytest.mark.parametrize("where", ["start", "log", "finish", "hang"])
def test_a_tracker_that_fails_or_hangs_neither_ends_nor_delays(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.5)
    began = time.monotonic()
    tracker = Background("tracker", lambda: Wild(where))
    for step in range(100):
        tracker.log({"step": step, "mfu": None})
    tracker.finish(failed=False)
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err.count("the run") == 1


def test_wandb_without_a_key_or_a_server_is_said_and_the_run_goes_on(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = [*map(str, Layout(zero=1).options(sharded_text, tmp_path / "run")), "--training.steps=3"]
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    variables = {**environment(), "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    variables.pop("WANDB_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-c", code, "launch/pretrain_ecp.py", *words, "--logging.wandb=online"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb has failed (no API key" in done.stderr
    assert len(metrics(tmp_path / "run")) == 3


def test_the_environment_chooses_the_mode_of_wandb_and_a_run_keeps_its_identity(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [*map(str, Layout(zero=1).options(sharded_text, tmp_path / "run")), "--logging.wandb=online"]
    for steps in (2, 4):
        train(parse([*words, f"--training.steps={steps}", "--resume=auto", "--allow-rate-jump"], ""))
    identity = wandb_identity(tmp_path / "run")
    parts = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert parts
    assert all(part.name.endswith(identity) for part in parts)


def test_a_copied_run_folder_gets_a_wandb_run_of_its_own(tmp_path: Path) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"
    first.mkdir()
    identity = wandb_identity(first)
    assert wandb_identity(first) == identity
    shutil.copytree(first, copy)
    assert wandb_identity(copy) not in ("", identity)
    assert wandb_identity(copy) == wandb_identity(copy)
    (first / "wandb_id").write_text("of-before")
    assert wandb_identity(first) == "of-before"


def test_steps_are_profiled_into_the_run_folder(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = [*map(str, Layout(zero=1).options(sharded_text, tmp_path / "run")), "--training.steps=4"]
    train(parse([*words, "--logging.profile_steps=[2,3]"], ""))
    trace = json.loads((tmp_path / "run" / "profile" / "steps-2-3.json").read_text())
    named = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    # Layouts accumulate over four micro-batches.
    assert [named.count(what) for what in ("forward", "backward", "update")] == [8, 8, 2]
    with pytest.raises(InputError, match=r"profile_steps is \[3, 2\], expected the first step and the last"):
        parse([*words, "--logging.profile_steps=[3,2]"], "")


def test_a_resume_says_what_it_changes(
    sharded_text: ShardedText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*map(str, Layout().options(sharded_text, tmp_path / "run")), "--resume=auto", "--allow-rate-jump"]
    train(parse([*words, "--training.steps=1"], ""))
    train(parse([*words, "--training.steps=1"], ""))
    assert "changed " not in capsys.readouterr().err
    # A launch that ended before its first save has left its config, and no checkpoint.
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("weight_decay: 0.1", "weight_decay: 0.2"))
    train(parse([*words, "--training.steps=2", "--optimizer.weight_decay=0.2", "--training.compile=false"], ""))
    train(parse([*words, "--training.steps=1"], ""))  # nothing to do
    assert "  steps: 2\n" in config.read_text()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed ")]
    assert said.pop() == "changed     training.compile was false and is now auto"
    assert said.pop() == "changed     training.steps was 2 and is now 1"
    assert said.pop() == "changed     optimizer.weight_decay was 0.2 and is now 0.1"
    assert said == [
        "changed     optimizer.weight_decay was 0.1 and is now 0.2",
        "changed     training.steps was 1 and is now 2",
        "changed     training.compile was auto and is now false",
    ]


def test_what_has_no_effect_on_a_cpu_is_said(
    sharded_text: ShardedText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*map(str, Layout().options(sharded_text, tmp_path / "run")), "--training.steps=1"]
    more = ("--training.tf32=true", "--training.flash_attention=FA3", "--logging.profile_steps=[5,6]")
    train(parse([*words, *more], ""))
    said = capsys.readouterr().err
    assert "note        training.tf32 has no effect on a CPU" in said
    assert "note        training.flash_attention has no effect on a CPU" in said
    assert "profile     none: logging.profile_steps is [5, 6], and no such step was done" in said


def test_tensorboard_gets_every_number_where_it_is_installed(sharded_text: ShardedText, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    words = [*map(str, Layout(zero=1).options(sharded_text, tmp_path / "run")), "--logging.tensorboard=true"]
    train(parse([*words, "--training.steps=2"], ""))
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"tokens_per_second" in events.read_bytes()


def test_a_missing_tracker_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for option, name in (("--logging.wandb=offline", "wandb"), ("--logging.tensorboard=true", "tensorboard")):
        config = parse(["--config", "demo", option, "--dry-run"], "").config
        with pytest.raises(InputError, match=rf"{name} is missing: pip install 'ecp-scale\[{name}\]'"):
            check_trackers(config)
    assert start_trackers(Config(), Path("/nowhere")) == []


def test_libraries_write_to_a_file_and_we_to_the_screen(tmp_path: Path) -> None:
    code = (
        "import os, sys, warnings; from pathlib import Path; from ecp_scale.console import quiet, say\n"
        "with quiet(Path(sys.argv[1])):\n"
        "    print('python'); os.system('echo child'); warnings.warn('warned')\n"
        "    os.write(2, b'from C\\n'); say('ours')\n"
        "print('after', file=sys.stderr)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "log")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "ours\nafter\n"
    log = (tmp_path / "log").read_text()
    assert all(text in log for text in ("python", "child", "warned", "from C"))
    assert "ours" not in log


def test_saying_to_nobody_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from ecp_scale.console import say; say('x'); say('y')"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert callable(quiet)
    assert callable(say)


def test_a_run_says_what_it_is_how_it_goes_and_how_it_ended(sharded_text: ShardedText, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = [*map(str, Layout(zero=1).options(sharded_text, output)), "--logging.every_steps=2"]
    done = run("launch/pretrain_ecp.py", *words, "--training.steps=5", "--checkpoint.every_steps=4")
    lines = done.stderr.splitlines()
    starts = [line.split("  ")[0] for line in lines if not line.startswith((" ", "note"))]  # nor reminders of long work
    assert done.stdout == ""
    assert starts[:6] == ["starting", "start", "model", "layout", "data", "run"]
    steps = [line.partition("  ")[0] for line in lines if line.startswith("step ") and "loss" in line]
    assert steps == ["step 1/5", "step 2/5", "step 4/5", "step 5/5"]
    assert "step 5/5  loss" in done.stderr
    assert done.stderr.count("validation loss") == 1
    assert "step 4  saved in" in done.stderr
    assert lines[-2].startswith("finished    step 5, loss ")
    assert lines[-1].endswith(f"ecp-convert --checkpoint {output} --output {output / 'model'}")
    assert "WARNING" not in done.stderr
    assert (output / "logs" / "rank-00000.log").exists()
    again = run("launch/pretrain_ecp.py", *words, "--training.steps=3", "--resume=auto")
    assert again.returncode == 0
    assert "nothing to do: step 5 is done, 1,280 tokens, and training.steps is 3" in again.stderr


def test_long_work_is_announced_and_brought_to_mind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "REMINDER_SECONDS", 0.05)
    with waiting("work"):
        time.sleep(0.3)
    with waiting("another rank's", prints=False):
        pass
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "work"
    assert len(said) > 2
    assert all("still running after" in line for line in said[1:])
