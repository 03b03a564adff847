"""Train architectures under one data order, budget, optimizer and evaluation, and put them into one table.

    ecp-compare --config BASE --architectures ecp,transformer,longlora --seeds 1,2,3 --output DIR \\
        --data.prefix shards/train --data.validation_prefix shards/validation [--test shards/test] \\
        [--ranks 2] [--section.key value ...] [--deepspeed_config FILE] [--dry-run]

Every cell (architecture, seed) is a run of ecp-pretrain in DIR/runs, exported to DIR/models and evaluated
with the `sliding` protocol, whose windows are the same for every architecture. Finished cells are not done again, an
unfinished one resumes from its checkpoint. It writes DIR/comparison.md, .json and .svg. The first architecture named is
the one that the others are compared with. A dry run prints parameters, FLOPs and receptive field of each.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ecp_scale.command_line import parse, to_yaml
from ecp_scale.config import Config
from ecp_scale.config.geometry import GEOMETRIES
from ecp_scale.config.renames import renamed_fields
from ecp_scale.data.manifest import manifest_path
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.evaluation.comparison import Cell, Protocol, Summary, markdown, plot, summaries
from ecp_scale.files import write_text

PROTOCOL: Protocol = "sliding"


@dataclass(frozen=True)
class Comparison:
    """What to compare, and where it goes."""

    base: Config
    deepspeed_path: str | None
    architectures: tuple[str, ...]
    seeds: tuple[int, ...]
    ranks: int
    test: str
    folder: Path
    dry_run: bool

    def config(self, architecture: str, seed: int) -> Config:
        """The config of a cell: the base with one word and the seed changed."""
        name = f"{architecture}-seed{seed}"
        return dataclasses.replace(
            self.base,
            model=dataclasses.replace(self.base.model, architecture=architecture),  # type: ignore[arg-type]
            training=dataclasses.replace(self.base.training, seed=seed, output_dir=str(self.folder / "runs" / name)),
        )

    def cell_file(self, architecture: str, seed: int) -> Path:
        """Where the figures of a finished cell are."""
        return self.folder / "cells" / f"{architecture}-seed{seed}.json"

    def finished(self) -> Iterator[Cell]:
        """Cells that are done, architecture by architecture."""
        for architecture in self.architectures:
            for seed in self.seeds:
                path = self.cell_file(architecture, seed)
                if path.exists():
                    yield Cell(**json.loads(path.read_text()))


@input_errors_exit()
def main() -> None:
    """Read the command line, train and evaluate what is missing, write the report."""
    comparison = read_command_line(sys.argv[1:])
    if comparison.dry_run:
        describe(comparison)
        return
    check_folder(comparison)
    # Seeds outside: what the machine does over time then falls on all architectures alike.
    for seed in comparison.seeds:
        for architecture in comparison.architectures:
            path = comparison.cell_file(architecture, seed)
            if path.exists():
                print(f"{path.stem}: done already", flush=True)
                continue
            config = comparison.config(architecture, seed)
            train(comparison, config)
            cell = evaluate_cell(comparison, config)
            write_text(path, json.dumps(dataclasses.asdict(cell)) + "\n")
            print(f"{path.stem}: {cell.bits_per_byte:.4f} bits per byte", flush=True)
    write_report(comparison)


def read_command_line(argv: list[str]) -> Comparison:
    """Parse and check everything, for every architecture, before any work.

    Raises:
        InputError: listing what is wrong.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other options are those of ecp-pretrain and hold for every cell.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--architectures", required=True, metavar="A,B,...", help=", ".join(GEOMETRIES))
    parser.add_argument("--seeds", default="1,2,3", metavar="N,N,...", help="default: 1,2,3")
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="DIR", help="folder to write")
    parser.add_argument("--test", type=os.path.expanduser, metavar="PREFIX", help="shards (default: for validation)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of each training run (default: 1)")
    options, rest = parser.parse_known_args(argv)
    problems = []
    architectures = tuple(options.architectures.split(","))
    for name in architectures:
        if name not in GEOMETRIES:
            problems.append(f"--architectures names {name!r}, expected some of {', '.join(GEOMETRIES)}")
    seeds = tuple(options.seeds.split(","))
    if not all(seed.isdecimal() for seed in seeds):
        problems.append(f"--seeds is {options.seeds!r}, expected numbers separated by commas")
    for what, values in (("--architectures", architectures), ("--seeds", seeds)):
        if len(set(values)) < len(values):
            problems.append(f"{what} names something twice: {','.join(values)}")
    if problems:
        raise InputError("\n".join(problems))
    request = parse(rest, "", ("data.prefix|data.blend", "data.validation_prefix"), world_size=options.ranks)
    if options.test and not any(path.exists() for path in (Path(options.test), manifest_path(Path(options.test)))):
        raise InputError(f"--test {options.test}: no such shards, file or folder")
    comparison = Comparison(
        base=request.config,
        deepspeed_path=request.deepspeed_path,
        architectures=architectures,
        seeds=tuple(map(int, seeds)),
        ranks=options.ranks,
        test=options.test or str(request.config.data.validation_prefix),
        folder=Path(options.output).resolve(),
        dry_run=request.dry_run,
    )
    for name in architectures:
        found = comparison.config(name, comparison.seeds[0]).problems(options.ranks)
        problems += [f"with model.architecture {name}: {problem}" for problem in found]
    if problems:
        raise InputError("the base config does not fit every architecture:\n" + "\n".join(f"  - {x}" for x in problems))
    return comparison


def describe(comparison: Comparison) -> None:
    """Print what the architectures count, next to the first one."""
    vocabulary = comparison.base.model.vocab_size
    print(f"{'architecture':30}{'parameters':>14}{'':9}{'MFLOPs per token':>18}{'trained':>9}{'field':>8}")
    first = None
    for name in comparison.architectures:
        model = dataclasses.replace(comparison.config(name, 0).model, vocab_size=vocabulary or 1)
        first = first or model
        share = model.parameters / first.parameters - 1
        counts = f"{model.parameters:14,}{share:+9.2%}{model.flops_per_token / 1e6:18,.2f}"
        print(f"{name:30}{counts}{model.geometry.trained_positions:9}{model.receptive_field_tokens:8}")
    if vocabulary is None:
        print("without embeddings and output layer: model.vocab_size is null")


def check_folder(comparison: Comparison) -> None:
    """Write what all cells share; refuse a folder whose cells were made otherwise.

    Raises:
        InputError: listing what differs.
    """
    path = comparison.folder / "base.yaml"
    shared = {
        "base": yaml.safe_load(to_yaml(comparison.base)),
        "deepspeed_config": Path(comparison.deepspeed_path).read_text() if comparison.deepspeed_path else None,
        "ranks": comparison.ranks,
        "test": comparison.test,
    }
    if path.exists():
        before = yaml.safe_load(path.read_text())
        differences = [
            f"{key} was {before.get(key)!r} and is now {value!r}"
            for key, value in shared.items()
            if key != "base" and before.get(key) != value
        ]
        for section, values in shared["base"].items():
            saved = renamed_fields(section, before["base"].get(section, {}))
            differences += [
                f"{section}.{key} was {saved.get(key)!r} and is now {value!r}"
                for key, value in values.items()
                if saved.get(key) != value
            ]
        if differences:
            raise InputError(
                f"--output {comparison.folder} holds another comparison:\n" + "\n".join(f"  - {x}" for x in differences)
            )
    (comparison.folder / "cells").mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(shared, sort_keys=False))


def train(comparison: Comparison, config: Config) -> None:
    """Run ecp-pretrain on a cell's config."""
    assert config.training.output_dir is not None
    run = Path(config.training.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "cell.yaml", to_yaml(config))
    launcher: list[object] = [sys.executable, "-m"]
    if comparison.ranks > 1:
        launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", comparison.ranks, "--module"]
    words = [*launcher, "ecp_scale.commands.pretrain", "--config", run / "cell.yaml", "--resume", "auto"]
    if comparison.deepspeed_path:
        words += ["--deepspeed_config", comparison.deepspeed_path]
    with (run / "output.log").open("a") as log:
        environment = {"OMP_NUM_THREADS": str(threads_per_rank(comparison)), **os.environ}
        done = subprocess.run([str(word) for word in words], stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        tail = "".join((run / "output.log").read_text().splitlines(True)[-20:])
        raise InputError(f"{run.name}: training ended with {done.returncode}; {run / 'output.log'} ends with\n{tail}")


def threads_per_rank(comparison: Comparison) -> int:
    """All cores, shared by the ranks, unless the environment says otherwise."""
    return int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // comparison.ranks)))


def evaluate_cell(comparison: Comparison, config: Config) -> Cell:
    """Export a trained cell, score the test shards, and read its metrics."""
    from ecp_scale.checkpoint.export import ExportedModel, export
    from ecp_scale.checkpoint.folder import find_checkpoint
    from ecp_scale.evaluation.perplexity import evaluate
    from ecp_scale.evaluation.texts import read_text
    from ecp_scale.parallel.device import local_device
    from ecp_scale.training.metrics import read_metrics

    run = Path(str(config.training.output_dir))
    folder = comparison.folder / "models" / run.name
    export(find_checkpoint(run), folder)
    exported = ExportedModel.open(folder)
    tokenizer = exported.tokenizer
    text = read_text(comparison.test, tokenizer)
    result = evaluate(exported.load(device=local_device(0)), text, tokenizer.end_of_document, PROTOCOL)
    records = read_metrics(run)
    return Cell(
        architecture=config.model.architecture,
        seed=config.training.seed,
        protocol=result.protocol,
        token_perplexity=result.token_perplexity,
        word_perplexity=result.word_perplexity,
        bits_per_byte=result.bits_per_byte,
        parameters=exported.config.parameters,
        flops_per_token=exported.config.flops_per_token,
        trained_positions=exported.config.geometry.trained_positions,
        tokens=records[-1]["tokens"],
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in records),
        peak_memory_bytes=max(record["peak_memory_bytes"] for record in records),
        curve=[[r["tokens"], r["validation_loss"]] for r in records if "validation_loss" in r],
    )


def write_report(comparison: Comparison) -> None:
    """Write comparison.md, .json and .svg from the finished cells, and print the table."""
    import torch

    cells = list(comparison.finished())
    records = summaries(cells)
    command = shlex.join(["ecp-compare", *sys.argv[1:]])
    environment = {
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CUDA: {torch.cuda.is_available()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": comparison.ranks,
        "threads_per_rank": threads_per_rank(comparison),
    }
    table = markdown(records)
    content = {
        "environment": environment,
        "protocol": PROTOCOL,
        "base": dataclasses.asdict(comparison.base),
        "architectures": [{key: _plain(value) for key, value in record.items()} for record in records],
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    notes = (
        f"Seeds {', '.join(map(str, comparison.seeds))}; {cells[0].tokens:,} tokens per run; protocol {PROTOCOL} on "
        f"{Path(comparison.test).name}. ± is the standard deviation over seeds.\n"
    )
    described = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    write_text(comparison.folder / "comparison.md", f"{table}\n{notes}\n{described}\n\n![curves](comparison.svg)\n")
    write_text(comparison.folder / "comparison.json", json.dumps(content, indent=1) + "\n")
    plot(cells, comparison.folder / "comparison.svg")
    print(f"\n{table}\n{notes}written to {comparison.folder}/comparison.{{md,json,svg}}")


def _plain(value: object) -> object:
    return dataclasses.asdict(value) if isinstance(value, Summary) else value
