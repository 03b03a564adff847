"""Write what is known of runs as one page: curves, events, stalls, differences of config, evaluations.

    ecp-report runs/first [runs/second ...] --output report.html

The page is one file of HTML with its pictures inside; it needs no network and reads on a telephone.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecp_scale.errors import InputError, input_errors_exit

SLOW = 3.0
"""A step is slow that takes so many times the median of its run."""
NOT_RESULTS = ("deepspeed.json", "stopped.json")
"""Files of a run folder, ending in .json, that hold no evaluation."""


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run says of it; ``steps`` are the records of metrics.jsonl, never empty."""

    folder: Path
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config: dict[str, Any]
    results: dict[str, dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The record of the newest step."""
        return self.steps[-1]

    def values(self, key: str) -> list[float]:
        """A number of all steps that have it."""
        return [record[key] for record in self.steps if record.get(key) is not None]

    @property
    def planned_steps(self) -> int:
        """Of the whole run."""
        return int(self.config.get("training", {}).get("steps") or self.last["step"])

    @property
    def state(self) -> str:
        """How the newest launch stands."""
        last = self.events[-1]["event"] if self.events else None
        if last in ("finished", "stopped", "failed"):
            return str(last)
        if self.last["step"] >= self.planned_steps:
            return "finished"
        return "running, or ended without a word"

    def seconds(self) -> dict[str, float]:
        """Where the time of the launches went: ``steps``, ``saves``, ``starts`` and ``else`` (validation, waits).

        Steps that were done again after a crash count once, since the record has them once; of a launch that was
        killed the time up to its last event or record is known.
        """
        steps = sum(self.values("step_seconds"))
        saves = sum(event.get("waited", 0.0) for event in self.events if event["event"] == "saved")
        starts = sum(event["time"] - _launched(event) for event in self.events if event["event"] == "started")
        whole = sum(end - begin for begin, end, _ in self.launches())
        found = {"steps": steps, "saves": saves, "starts": starts}
        return {**found, "else": max(0.0, whole - sum(found.values()))}

    def launches(self) -> list[tuple[float, float, str]]:
        """Begin, end (Unix seconds) and end of each launch that events tell of."""
        marks = [event["time"] for event in self.events]
        marks += [record["time"] for record in self.steps if "time" in record]
        begins = [_launched(event) for event in self.events if event["event"] == "started"]
        found = []
        for begin, following in zip(begins, [*begins[1:], float("inf")], strict=True):
            inside = [mark for mark in marks if begin <= mark < following]
            named = [event["event"] for event in self.events if begin <= event["time"] < following]
            ended = named[-1] if named[-1] in ("finished", "stopped", "failed") else "no end on record"
            found.append((begin, max(inside), ended))
        return found

    def slow_steps(self) -> list[dict[str, Any]]:
        """Steps that took ``SLOW`` times the median and more, slowest first."""
        median = statistics.median(self.values("step_seconds"))
        found = [record for record in self.steps if record.get("step_seconds", 0) >= SLOW * median]
        return sorted(found, key=lambda record: -record["step_seconds"])


def _launched(event: dict[str, Any]) -> float:
    """When a launch that has started was begun."""
    return float(event.get("launched", event["time"]))


def read_run(folder: Path, steps: list[dict[str, Any]], results: Sequence[Path]) -> RunRecord:
    """Read the folder of a run whose steps are known.

    Args:
        folder: of the run.
        steps: records of its metrics.jsonl.
        results: files of ecp-evaluate beside those in the folder.

    Raises:
        InputError: naming a file that cannot be read.
    """
    import yaml

    from ecp_scale.training.events import read_events

    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the folder of a run") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not the config of a run ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: found {type(config).__name__}, expected the config of a run")
    found = {file.name: file for file in sorted(folder.glob("*.json")) if file.name not in NOT_RESULTS}
    found |= {str(file): file for file in results}
    return RunRecord(folder, steps, read_events(folder), config, {name: _object(file) for name, file in found.items()})


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON, {error}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: found a {type(content).__name__}, expected an object as ecp-evaluate --json writes it"
        )
    return content


def differences(runs: dict[str, RunRecord]) -> dict[str, list[Any]]:
    """Fields of the config that are not the same in all runs, with the value in each; None where one has no such."""
    flat = [
        {f"{section}.{name}": value for section, fields in run.config.items() for name, value in (fields or {}).items()}
        for run in runs.values()
    ]
    names = list(dict.fromkeys(name for fields in flat for name in fields))
    found = {name: [fields.get(name) for fields in flat] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


@input_errors_exit()
def main() -> None:
    """Read the command line and the runs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=os.path.expanduser, metavar="RUN", help="run folders")
    parser.add_argument(
        "--output", type=os.path.expanduser, metavar="FILE", help=".html (default: RUN/report.html of the first)"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        type=os.path.expanduser,
        metavar="FILE",
        help="files of ecp-evaluate --json; those in run folders are found",
    )
    options = parser.parse_args()
    folders = [Path(run) for run in options.runs]
    output = Path(options.output) if options.output else folders[0] / "report.html"
    if output.suffix != ".html":
        raise InputError(f"--output {output}: expected a name that ends in .html")

    from ecp_scale.commands.plot import records_of

    records = records_of(folders)
    results = [Path(file) for file in options.results]
    runs = {
        name: read_run(folder, steps, results if number == 0 else [])
        for number, (folder, (name, steps)) in enumerate(zip(folders, records.items(), strict=True))
    }
    try:
        from ecp_scale.commands.report_page import page

        content = page(runs)
    except ImportError as error:
        raise InputError("matplotlib is missing: pip install 'ecp-scale[export]'") from error

    from ecp_scale.files import write_text

    try:
        write_text(output, content)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror or error}") from error
    print(output)
