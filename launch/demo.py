"""The whole road in minutes: real text in; a trained, resumed, converted and evaluated ECP model out.

The text is what every machine with Python has: the source files of its standard library. Every step is a command that a
user would type; the run is killed once on the way and must continue exactly where its last checkpoint stood.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ecp_scale.command_line import parse
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_SHARE = 16
"""One file in this many is held out."""
KILLED_AFTER_CHECKPOINT_STEPS = 5
MARKER = ".ecp-demo"
Record = dict[str, Any]


@dataclass(frozen=True)
class Paths:
    """Everything the demo writes."""

    folder: Path

    @property
    def text(self) -> Path:
        """Collected documents."""
        return self.folder / "text"

    @property
    def tokenizer(self) -> Path:
        """Trained tokenizer."""
        return self.folder / "tokenizer.model"

    @property
    def run(self) -> Path:
        """Training run."""
        return self.folder / "run"

    @property
    def model(self) -> Path:
        """Exported model."""
        return self.folder / "model"

    @property
    def report(self) -> Path:
        """Report folder."""
        return self.folder / "report"

    def shards(self, part: str) -> Path:
        """Shard prefix of train, validation or test."""
        return self.folder / "shards" / part


def collect_text(folder: Path) -> dict[str, int]:
    """Write the standard library's sources as train, validation and test .jsonl; return the documents of each.

    A file's part is decided by the hash of its name.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    folder.mkdir(parents=True)
    documents: dict[str, int] = {}
    parts = {part: (folder / f"{part}.jsonl").open("w") for part in ("train", "validation", "test")}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if {"site-packages", "test", "tests", "idle_test", "__pycache__"} & set(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        number = hashlib.sha256(str(name).encode()).digest()[0] % HELD_OUT_SHARE
        part = {0: "test", 1: "validation"}.get(number, "train")
        parts[part].write(json.dumps({"text": text, "path": str(name)}) + "\n")
        documents[part] = documents.get(part, 0) + 1
    for file in parts.values():
        file.close()
    return documents


def shell(*command: object) -> list[str]:
    """Words of a command, printed as a user would type it."""
    words = [str(word) for word in command]
    shown = shlex.join(str(Path(word).name) if word.endswith(("/python", "/deepspeed")) else word for word in words)
    print(f"$ {shown.replace(str(ROOT) + '/', '')}", flush=True)
    return words


def call(script: str, *options: object) -> None:
    """Run a script of this repository with this interpreter, and print the first line of what it says."""
    done = subprocess.run(shell(sys.executable, ROOT / script, *options), check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout.partition("\n")[0], flush=True)


def training_command(paths: Paths, ranks: int, options: list[str]) -> list[object]:
    """The launch, the same before and after the kill."""
    return [
        *(Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks, ROOT / "launch/pretrain_ecp.py"),
        *("--config", "demo", "--deepspeed_config", ROOT / "ds_configs/zero1.json", "--resume", "auto"),
        *("--data.prefix", paths.shards("train"), "--data.validation_prefix", paths.shards("validation")),
        *(
            "--training.output_dir",
            paths.run,
            "--parallel.tensor",
            ranks,
            "--logging.every_steps",
            1000,
            "--training.validation_every_steps",
            120,
        ),
        *options,
    ]


def train_with_one_kill(paths: Paths, ranks: int, options: list[str]) -> tuple[int, list[Record]]:
    """Train, kill -9 the launch a few steps after the first checkpoint, and launch it again.

    Returns:
        The step of the checkpoint, and the records of the steps that the kill undid.
    """
    command = shell(*training_command(paths, ranks, options))
    log = (paths.folder / "launcher.log").open("a")  # what DeepSpeed's launcher says on standard output
    process = subprocess.Popen(command, stdout=log)
    checkpoint = None
    while process.poll() is None:
        saved = sorted((paths.run / "checkpoints").glob("step-*/checkpoint.json"))
        if saved and checkpoint is None:
            checkpoint = int(saved[0].parent.name.removeprefix("step-"))
        if checkpoint is not None and len(read_metrics(paths.run)) >= checkpoint + KILLED_AFTER_CHECKPOINT_STEPS:
            break
        time.sleep(0.2)
    if checkpoint is None or process.poll() is not None:
        raise subprocess.CalledProcessError(process.returncode or 1, command)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.wait()
    undone = [record for record in read_metrics(paths.run) if record["step"] > checkpoint]
    print(f"killed after step {undone[-1]['step']}; the newest checkpoint is of step {checkpoint}", flush=True)
    subprocess.run(shell(*training_command(paths, ranks, options)), stdout=log, check=True)
    log.close()
    return checkpoint, undone


def rows(
    paths: Paths, documents: dict[str, int], checkpoint: int, undone: list[Record], seconds: float
) -> Iterator[tuple[str, str]]:
    """What was done and where it is."""
    records = {record["step"]: record for record in read_metrics(paths.run)}
    result = json.loads((paths.report / "evaluation.json").read_text())
    last = records[max(records)]
    same = all(records[record["step"]]["loss"] == record["loss"] for record in undone)
    below = 1 - result["bits_per_byte"] / result["unigram_bits_per_byte"]
    files = ", ".join(f"{count} {part}" for part, count in documents.items())
    yield "text", f"files of the standard library: {files}, in {paths.text}"
    yield "training", f"{last['step']} steps, {last['tokens']:,} tokens, {last['tokens_per_second']:.0f} tokens/s"
    yield "loss", f"{records[1]['loss']:.3f} -> {last['loss']:.3f} (validation {last['validation_loss']:.3f})"
    redone = f"{undone[0]['step']}-{undone[-1]['step']}"
    verdict = "the same losses to the bit" if same else "OTHER LOSSES"
    yield "resume", f"from step {checkpoint}; steps {redone} done again: {verdict}"
    yield "held-out bits per byte", f"{result['bits_per_byte']:.3f} ({result['protocol']})"
    yield "unigram bits per byte", f"{result['unigram_bits_per_byte']:.3f} (same tokenizer, same files)"
    yield "below unigram", f"{below:.1%}"
    yield "report", f"{paths.report} (report.html, curves.png, evaluation.json, sample.txt, report.md)"
    yield "wall time", f"{seconds:.0f} s without installation"
    if not same:
        raise RuntimeError("the resumed run did not repeat the killed one")


def main() -> None:
    """Run every step and print the table."""
    parser = OptionParser(description=__doc__)
    parser.add_argument(
        "--output",
        default="demo",
        type=os.path.expanduser,
        metavar="DIR",
        help="folder to write, emptied first (default: demo)",
    )
    parser.add_argument("--ranks", type=int, help="ranks of the launch (default: 2, or the only GPU)")
    options, training_options = parser.parse_and_pass_on()
    if options.ranks is not None and options.ranks < 1:
        parser.error(f"--ranks is {options.ranks}, expected at least 1")
    # Before anything is removed.
    parse(["--config", "demo", "--dry-run", *training_options], "", options=parser.names)
    began = time.monotonic()
    paths = Paths(Path(options.output).resolve())
    _empty(paths)
    ranks = options.ranks or _ranks()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    documents = collect_text(paths.text)
    train_text = paths.text / "train.jsonl"
    call("data_tools/train_tokenizer.py", "--input", train_text, "--output", paths.tokenizer, "--vocab-size", 2048)
    for part in documents:
        source, spec = paths.text / f"{part}.jsonl", f"sentencepiece:{paths.tokenizer}"
        output = ("--output-prefix", paths.shards(part), "--workers", 2)
        call("data_tools/preprocess.py", "--input", source, "--tokenizer", spec, *output)
    checkpoint, undone = train_with_one_kill(paths, ranks, training_options)
    call("launch/convert_checkpoint.py", "--checkpoint", paths.run, "--output", paths.model)
    paths.report.mkdir()
    result = ("--unigram", paths.shards("train"), "--json", paths.report / "evaluation.json")
    call("launch/evaluate.py", "--model", paths.model, "--data", paths.shards("test"), *result)
    prompt = ("--prompt", "def read_file(path):\n", "--max-new-tokens", 120)
    sample = shell(sys.executable, ROOT / "launch/generate.py", "--model", paths.model, *prompt)
    text = subprocess.run(sample, check=True, stdout=subprocess.PIPE, text=True).stdout
    (paths.report / "sample.txt").write_text(text)
    call("launch/plot.py", paths.run, "--output", paths.report / "curves.png")
    results = ("--results", paths.report / "evaluation.json")
    call("launch/report.py", paths.run, "--output", paths.report / "report.html", *results)
    table = list(rows(paths, documents, checkpoint, undone, time.monotonic() - began))
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table)]
    (paths.report / "report.md").write_text("# Demo\n\n" + "\n".join(lines) + "\n\n![curves](curves.png)\n")
    print("\n" + "\n".join(f"{name:24}{value}" for name, value in table))


def _empty(paths: Paths) -> None:
    """Remove what an earlier demo has written, by its names; the marker tells that it was one."""
    marker = paths.folder / MARKER
    if paths.folder.exists():
        found = [path.name for path in paths.folder.iterdir()] if paths.folder.is_dir() else [paths.folder.name]
        ours = {
            MARKER,
            "text",
            "tokenizer.model",
            "tokenizer.vocab",
            "run",
            "model",
            "report",
            "shards",
            "launcher.log",
        }
        if found and (not marker.is_file() or set(found) - ours):
            odd = sorted(set(found) - ours) or sorted(found)
            raise InputError(
                f"--output {paths.folder} holds {', '.join(odd[:4])}, not an earlier demo alone; choose an empty or a "
                "new folder"
            )
        shutil.rmtree(paths.folder)
    paths.folder.mkdir(parents=True)
    marker.write_text("made by launch/demo.py, which may remove this folder\n")


def _ranks() -> int:
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


if __name__ == "__main__":
    with input_errors_exit():
        try:
            main()
        except subprocess.CalledProcessError as failed:
            print(
                f"\nthe demo stopped: {shlex.join(map(str, failed.cmd))} ended with {failed.returncode}",
                file=sys.stderr,
            )
            sys.exit(1)
