"""Kill launches at random moments, go on, and compare with a run that was left alone: python -m tests.training.kills.

Every kill is SIGKILL to a random rank, to the launcher, or to all; a third comes inside a save, the first one in the
first save. The user's own files lie in the folder of checkpoints. What must hold: every launch goes on to the bit, or
starts afresh where nothing had been saved, and nothing of the user's is touched.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from ecp_scale.checkpoint.folder import CheckpointRecord, checkpoints_folder, complete_checkpoints
from ecp_scale.zero.state_files import damages
from tests.corpus import ShardedText, write_sharded_text
from tests.launching import command, environment, metrics
from tests.parallel.layouts import Layout

SCRIPT = "launch/pretrain_ecp.py"
STEPS = 400
EVERY = 5
LAYOUT = Layout(data=2, zero=1, settings="paper")


def options(folder: Path, run: Path, asynchronous: bool) -> list[str]:
    """A run of two ranks with dropout that saves often."""
    text = ShardedText(folder / "text", ())
    if not text.folder.exists():
        write_sharded_text(text.folder)
    words = [word for word in map(str, LAYOUT.options(text, run)) if "validation" not in word]
    more = (
        f"--training.steps={STEPS}",
        f"--checkpoint.every_steps={EVERY}",
        "--checkpoint.keep_last=2",
        "--model.dropout=0.1",
        f"--checkpoint.asynchronous={str(asynchronous).lower()}",
    )
    return [*words, *more, "--resume=auto"]


def processes(launch: "subprocess.Popen[bytes]") -> tuple[psutil.Process, list[psutil.Process]]:
    """The launcher and its ranks."""
    launcher = psutil.Process(launch.pid)
    ranks = [child for child in launcher.children(recursive=True) if any(SCRIPT in word for word in child.cmdline())]
    return launcher, ranks


def saves_in_progress(run: Path) -> set[int]:
    """Folders that are being written, or that a kill has left, by their inodes."""
    found = set()
    for path in checkpoints_folder(run).glob("step-*.partial"):
        with suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def kill_once(words: list[str], run: Path, draw: random.Random, in_save: bool) -> str:
    """Start a launch and kill it at a random moment; what was killed, or that it was finished.

    The launch must say that it goes on from the newest checkpoint that stood before it, or afresh if none did.
    """
    stood = complete_checkpoints(run)
    with tempfile.TemporaryFile() as errors:
        launch = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=errors)
        victim = _kill(launch, run, draw, in_save)
        errors.seek(0)
        said = errors.read().decode()
    expected = f"start       resumed from {stood[-1]}: " if stood else f"start       fresh, in {run}\n"
    if expected not in said and "start  " in said:
        raise SystemExit(f"expected {expected!r}, found {said}")
    return victim


def _kill(launch: "subprocess.Popen[bytes]", run: Path, draw: random.Random, in_save: bool) -> str:
    first = len(metrics(run)) if (run / "metrics.jsonl").exists() else 0
    after = draw.randrange(1, 14)
    victim = draw.choice(["rank", "launcher", "all"])
    saves = draw.randrange(1, 3)
    before, seen = saves_in_progress(run), set()
    while launch.poll() is None:
        partial = saves_in_progress(run) - before
        seen |= partial
        steps = (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
        if (in_save and partial and len(seen) >= saves) or (not in_save and steps >= first + after):
            time.sleep(draw.random() * (0.01 if in_save else 0.05))
            break
        time.sleep(0 if in_save and steps % EVERY == EVERY - 1 else 0.001)
    if launch.poll() is not None:
        return "finished"
    with suppress(psutil.NoSuchProcess):
        launcher, ranks = processes(launch)
        for process in {"rank": [draw.choice(ranks)], "launcher": [launcher], "all": [launcher, *ranks]}[victim]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, left = psutil.wait_procs([launcher, *ranks], timeout=60)
        if left:
            raise SystemExit(f"60 s after the {victim} was killed, {len(left)} processes are at work")
    launch.wait()
    return victim


def check(run: Path, expected: list[dict[str, object]], foreign: dict[Path, bytes]) -> None:
    """What holds after every kill."""
    for path, content in foreign.items():
        if path.read_bytes() != content:
            raise SystemExit(f"{path} was touched")
    for folder in complete_checkpoints(run):
        found = damages(folder, CheckpointRecord.read(folder).files)
        if found:
            raise SystemExit("\n".join(found))
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (run / "metrics.jsonl").exists() else []
    for record in map(json.loads, lines):
        wanted = expected[record["step"] - 1]
        for key in ("loss", "grad_norm", "data_digest", "lr"):
            if record[key] != wanted[key]:
                raise SystemExit(f"step {record['step']}: {key} is {record[key]}, expected {wanted[key]}")


def campaign(kills: int, seed: int, folder: Path, asynchronous: bool = False) -> dict[str, int]:
    """Kill as often as asked, in runs that are begun anew when they are finished; how often which victim."""
    alone, run = folder / "alone", folder / "run"
    subprocess.run(command(SCRIPT, 2, options(folder, alone, False), "torchrun"), env=environment(), check=True)
    expected = metrics(alone)
    counts: dict[str, int] = {}
    done = 0
    while done < kills:
        shutil.rmtree(run, ignore_errors=True)
        names = ("step-00000005-best/notes.txt", "step-00000010.bak/weights", "todo.txt")
        foreign = {checkpoints_folder(run) / name: name.encode() for name in names}
        for path, content in foreign.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        victim = ""
        while victim != "finished" and done < kills:
            draw = random.Random(f"{seed} {done}")
            words = command(SCRIPT, 2, options(folder, run, asynchronous), draw.choice(["deepspeed", "torchrun"]))
            in_save = done % 3 == 0
            victim = kill_once(words, run, draw, in_save)
            check(run, expected, foreign)
            key = victim + (" in a save" if in_save and victim != "finished" else "")
            counts[key] = counts.get(key, 0) + 1
            done += victim != "finished"
            print(f"kill {done}: {key}, {len(complete_checkpoints(run))} checkpoints", flush=True)
    subprocess.run(command(SCRIPT, 2, options(folder, run, asynchronous), "torchrun"), env=environment(), check=True)
    check(run, expected, foreign)
    if len(metrics(run)) != STEPS:
        raise SystemExit(f"the last launch ended after {len(metrics(run))} of {STEPS} steps")
    return counts


def main() -> None:
    """Kill, and print how often what was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--asynchronous", action="store_true", help="the runs save behind the training")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(campaign(parsed.kills, parsed.seed, Path(name), parsed.asynchronous))


if __name__ == "__main__":
    sys.exit(main())
