"""Write what is known of runs as one page: curves, events, stalls, differences of config, evaluations.

    ecp-report runs/first [runs/second ...] --output report.html

The page is one file of HTML with its pictures inside; it needs no network and reads on a telephone.
"""

import math
import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.files import read_object, write_text
from ecp_scale.option_parser import OptionParser
from ecp_scale.training.events import ENDS, STARTED, read_events

SLOW = 3.0
"""A step is slow that takes so many times the median of its run."""
EVALUATION = {"protocol", "accuracy"}
"""Keys of which an evaluation in JSON has one."""


class Launch(NamedTuple):
    """When a launch began and ended (Unix seconds), and how: an event of ``ENDS``, or empty if no end is on record."""

    begin: float
    end: float
    ended: str

    def until(self, time: float, ended: str = "") -> "Launch":
        """The same, known to have gone on until then."""
        return self._replace(end=max(self.end, time), ended=ended)


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

    def median(self, key: str) -> float:
        """Of a number of all steps that have it; NaN where none has."""
        return statistics.median(self.values(key) or [math.nan])

    @property
    def planned_steps(self) -> int:
        """Of the whole run."""
        return int(self.config.get("training", {}).get("steps") or self.last["step"])

    @property
    def state(self) -> str:
        """How the newest launch stands."""
        if self.launches and self.launches[-1].ended:
            return self.launches[-1].ended
        return "finished" if self.last["step"] >= self.planned_steps else "running, or ended without a word"

    @cached_property
    def launches(self) -> list[Launch]:
        """Launches that events tell of, in their order: clocks of several hosts need not agree."""
        found: list[Launch] = []
        is_open = False
        for event in self.events:
            if event["event"] == STARTED:
                begin = float(event.get("launched", event["time"]))
                found.append(Launch(begin, max(begin, event["time"]), ""))
                is_open = True
            elif is_open:
                ended = event["event"] if event["event"] in ENDS else ""
                found[-1] = found[-1].until(event["time"], ended)
                is_open = not ended
        for number, launch in enumerate(found):
            if not launch.ended:  # the record knows how far it came
                following = found[number + 1].begin if number + 1 < len(found) else math.inf
                times = [time for time in self.values("time") if launch.begin <= time < following]
                found[number] = launch.until(max(times, default=launch.end))
        return found

    def seconds(self) -> dict[str, float]:
        """Where the time of the launches went: ``steps``, ``saves``, ``starts`` and ``else`` (validation, waits).

        A start is counted from when the libraries are loaded. Steps that were done again after a crash count once,
        since the record has them once.
        """
        starts = [event for event in self.events if event["event"] == STARTED]
        found = {
            "steps": sum(record.get("step_seconds") or 0.0 for record in self.steps if "time" in record),
            "saves": sum(event.get("waited", 0.0) for event in self.events if event["event"] == "saved"),
            "starts": sum(max(0.0, event["time"] - event.get("launched", event["time"])) for event in starts),
        }
        whole = sum(launch.end - launch.begin for launch in self.launches)
        return {**found, "else": max(0.0, whole - sum(found.values()))}

    def slow_steps(self) -> list[dict[str, Any]]:
        """Steps that took ``SLOW`` times the median and more, slowest first."""
        median = self.median("step_seconds")
        found = [record for record in self.steps if (record.get("step_seconds") or 0) >= SLOW * median]
        return sorted(found, key=lambda record: -record["step_seconds"])


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

    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the folder of a run") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not the config of a run ({type(error).__name__})") from error
    if not isinstance(config, dict) or not all(isinstance(fields, dict) for fields in config.values()):
        raise InputError(f"{path}: not the config of a run, which has sections of fields")
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        with suppress(InputError):  # whose it is, who knows
            content = _object(file)
            if EVALUATION & set(content):
                found[file.name] = content
    found |= {str(file): _object(file) for file in results}
    events = read_events(folder)
    # A fresh start has put the record of what was before aside, too.
    fresh = [n for n, event in enumerate(events) if (event["event"], event["step"]) == (STARTED, 0)]
    return RunRecord(folder, steps, events[fresh[-1] if fresh else 0 :], config, found)


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, str(path), "an object as ecp-evaluate --json writes it")


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
    parser = OptionParser(description=__doc__)
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

    try:
        write_text(output, content)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror or error}") from error
    print(output)
