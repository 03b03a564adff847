"""The folder of a comparison: what all its cells share, the figures of those that are done, and the report."""

import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ecp_scale.command_line import to_yaml
from ecp_scale.commands.cells import Budget, Launch, Plan
from ecp_scale.config import Config
from ecp_scale.config.renames import renamed_fields
from ecp_scale.errors import InputError
from ecp_scale.evaluation.comparison import Cell, Summary, accuracy_table, plot, plot_accuracy, summaries, table
from ecp_scale.evaluation.ladder import law_table, laws, plot_ladder
from ecp_scale.files import finite, write_text


@dataclass(frozen=True)
class Comparison:
    """What to compare, and where it goes."""

    base: Config
    launch: Launch
    plans: tuple[Plan, ...]
    test: str
    task: str | None
    budget: Budget
    tokens_per_parameter: float | None
    folder: Path
    dry_run: bool

    def cell_file(self, plan: Plan) -> Path:
        """Where the figures of a finished cell are."""
        return self.folder / "cells" / f"{plan.name}.json"

    def finished(self) -> Iterator[Cell]:
        """Cells that are done, in the order of the plans."""
        for plan in self.plans:
            if self.cell_file(plan).exists():
                yield Cell(**json.loads(self.cell_file(plan).read_text()))


def check_folder(comparison: Comparison) -> None:
    """Write what all cells share; refuse a folder whose cells were made otherwise.

    Raises:
        InputError: listing what differs.
    """
    path = comparison.folder / "base.yaml"
    deepspeed, ratio = comparison.launch.deepspeed_path, comparison.tokens_per_parameter
    shared = {
        "base": yaml.safe_load(to_yaml(comparison.base)),
        "deepspeed_config": Path(deepspeed).read_text() if deepspeed else None,
        "ranks": comparison.launch.ranks,
        "test": comparison.test,
        # Where they are as usual, folders of earlier versions go on.
        **({"task": comparison.task} if comparison.task is not None else {}),
        **({"budget": comparison.budget} if comparison.budget != "tokens" else {}),
        **({"tokens_per_parameter": ratio} if ratio is not None else {}),
    }
    if path.exists():
        before = yaml.safe_load(path.read_text())
        differences = [
            f"{key} was {before.get(key)!r} and is now {shared.get(key)!r}"
            for key in {**before, **shared}
            if key != "base" and before.get(key) != shared.get(key)
        ]
        for section, values in shared["base"].items():
            saved = renamed_fields(section, before["base"].get(section, {}))
            differences += [
                f"{section}.{key} was {saved[key]!r} and is now {value!r}"
                for key, value in values.items()
                if key in saved and saved[key] != value
            ]
        if differences:
            raise InputError(
                f"--output {comparison.folder} holds another comparison:\n" + "\n".join(f"  - {x}" for x in differences)
            )
    (comparison.folder / "cells").mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(shared, sort_keys=False))


def write_report(comparison: Comparison, failed: Mapping[str, str]) -> None:
    """Write comparison.md, .json and pictures from the finished cells, and print a table.

    Args:
        comparison: of which some cells are done.
        failed: why others are not, by name.
    """
    import torch

    cells = list(comparison.finished())
    environment = {
        "command": shlex.join(["ecp-compare", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CUDA: {torch.cuda.is_available()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": comparison.launch.ranks,
        "jobs": comparison.launch.jobs,
        "threads_per_rank": comparison.launch.threads_per_rank,
    }
    folder = comparison.folder
    records = summaries(cells, (comparison.plans[0].architecture, comparison.plans[0].point))
    parts, shown, pictures = [], [], ["comparison.svg"]
    if comparison.task is not None:
        from ecp_scale.preparation.probes import chance

        at_random = chance(cells[0].protocol)  # type: ignore[arg-type]
        parts.append(f"Share of symbols that are right, by distance in tokens; a guess gets {at_random:.3f}.\n")
        parts.append(accuracy_table(cells))
        shown.append(accuracy_table(cells))
        plot_accuracy(cells, at_random, folder / "accuracy.svg")
        pictures.append("accuracy.svg")
    else:
        parts.append(table(records))
        shown.append(table(records, short=True))
        if laws(cells):
            parts += ["Bits per byte as a power of FLOPs, with intervals of 95 %.\n", law_table(laws(cells))]
            shown.append(law_table(laws(cells)))
            plot_ladder(cells, folder / "ladder.svg")
            pictures.append("ladder.svg")
    parts.append(_notes(comparison, cells))
    parts += [f"Without {name}, which failed: {text}\n" for name, text in failed.items()]
    content = {
        "environment": environment,
        "protocol": cells[0].protocol,
        "base": dataclasses.asdict(comparison.base),
        "architectures": [{key: _plain(value) for key, value in record.items()} for record in records],
        "failed": dict(failed),
        "laws": {name: dataclasses.asdict(law) for name, law in laws(cells).items()} if not comparison.task else {},
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    plot(cells, folder / "comparison.svg")
    described = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    linked = "\n".join(f"![{name}]({name})" for name in pictures)
    write_text(folder / "comparison.md", "\n".join([*parts, described, "", linked]) + "\n")
    write_text(folder / "comparison.json", json.dumps(finite(content), indent=1) + "\n")
    print(
        "\n"
        + "\n".join([*shown, _notes(comparison, cells)])
        + f"written to {folder}: comparison.md, .json, {', '.join(pictures)}"
    )


def _notes(comparison: Comparison, cells: list[Cell]) -> str:
    seeds = sorted({cell.seed for cell in cells})
    budget = {
        "tokens": "equal tokens for all",
        "flops": "all with the FLOPs of the first architecture",
        "seconds": "all with the time of the first architecture, by the speed of a trial",
    }[comparison.budget]
    if len({cell.point for cell in cells}) > 1:
        budget += ", at each point"
    what = f"protocol {cells[0].protocol} on {comparison.test}"
    if comparison.task is not None:
        what = f"probes {Path(comparison.task).name}"
    spread = "± is the standard deviation over seeds." if len(seeds) > 1 else "One seed: nothing is known of the noise."
    return f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; {budget}; {what}. {spread}\n"


def _plain(value: object) -> object:
    return dataclasses.asdict(value) if isinstance(value, Summary) else value
