"""The page about runs: its figures are those of the record, and it says what happened."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ecp_scale.command_line import parse
from ecp_scale.commands.report import differences, read_run
from ecp_scale.training.events import EventLog, read_events
from ecp_scale.training.loop import train
from ecp_scale.training.metrics import read_metrics
from tests.corpus import ShardedText
from tests.launching import metrics, run, run_successfully
from tests.parallel.layouts import Layout

BEGAN = 1_000_000.0


class Tables(HTMLParser):
    """Cells of all tables of a page, by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        """Begin a row or a cell."""
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._inside = self._inside or tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        """End a cell."""
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, text: str) -> None:
        """Take the text of a cell."""
        if self._inside:
            self.rows[-1][-1] += text

    def row(self, name: str) -> list[str]:
        """What stands behind a name in the first column."""
        return next(row[1:] for row in self.rows if row and row[0] == name)


def write_run(folder: Path, events: list[dict[str, Any]], steps: int = 6, slow: int = 0, **optimizer: Any) -> Path:
    """A run of six seconds, of which one step may be slow."""
    folder.mkdir()
    rate = optimizer.get("learning_rate", 0.001)
    (folder / "config.yaml").write_text(
        f"model: {{architecture: ecp, layers: 2}}\noptimizer: {{learning_rate: {rate}}}\ntraining: {{steps: 6}}\n"
    )
    records = [
        {
            "step": step,
            "time": BEGAN + 10 + step,
            "tokens": 1000 * step,
            "loss": 5.0 - step / 8,
            "grad_norm": 1.0,
            "lr": rate,
            "step_seconds": 40.0 if step == slow else 0.5,
            "tokens_per_second": 2000.0 + step,
            "mfu": None,
            "peak_memory_bytes": 2_000_000_000,
            "skipped_steps": 0,
            "data_digest": f"{step:016x}",
            **({"validation_loss": 4.5 if step == 3 else 4.75, "validation_by_position": [[0, 0, 5.0], [1, 1, 4.0]]}),
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def event(kind: str, after: float, step: int, **more: Any) -> dict[str, Any]:
    """Something that happened so many seconds after the beginning."""
    return {"event": kind, "time": BEGAN + after, "step": step, **more}


WHOLE = [
    event("started", 8.0, 0, ranks=2, hosts=["a", "b"], launched=BEGAN),
    event("saved", 13.0, 3, seconds=0.75, waited=0.25),
    event("finished", 17.0, 6),
]


def test_the_figures_are_those_of_the_record(tmp_path: Path) -> None:
    write_run(tmp_path / "first", WHOLE, slow=5)
    write_run(tmp_path / "<b>second", WHOLE[:2], steps=4, learning_rate=0.002)
    (tmp_path / "first" / "stream.json").write_text(json.dumps({"protocol": "stream", "bits_per_byte": 1.23456}))
    (tmp_path / "more.json").write_text(json.dumps({"accuracy": 0.75, "labels": ["a"]}))
    output = tmp_path / "page.html"
    folders = (tmp_path / "first", tmp_path / "<b>second")
    told = run_successfully("launch/report.py", *folders, "--output", output, "--results", tmp_path / "more.json")
    assert told.strip() == str(output)
    text = output.read_text()
    page = Tables(text)
    assert page.row("state") == ["finished", "running, or ended without a word"]
    assert page.row("steps") == ["6 of 6", "4 of 6"]
    assert page.row("tokens") == ["6,000", "4,000"]
    assert page.row("loss (last)") == ["4.2500", "4.5000"]
    assert page.row("validation loss (last)") == ["4.7500", "4.7500"]
    assert page.row("validation loss (best)") == ["4.5000", "4.5000"]
    assert page.row("tokens per second (median)") == ["2,004", "2,002"]
    assert page.row("peak memory of rank 0 (GB)") == ["2.0000", "2.0000"]
    assert page.row("slow steps") == ["1", "0"]
    assert page.row("data digest") == [f"{6:016x}", f"{4:016x}"]
    assert page.row("time in steps") == ["0:00:42", "0:00:02"]
    assert page.row("time in starts") == ["0:00:08", "0:00:08"]
    assert page.row("optimizer.learning_rate") == ["0.001", "0.002"]
    assert ["5", "40.0000", "80.0000"] in page.rows
    assert page.row("bits_per_byte") == ["1.2346"]
    assert page.row("accuracy") == ["0.7500"]
    assert any(row[1:] == ["started", "0", "ranks 2, hosts a, b"] for row in page.rows)
    assert "mfu" not in text.lower().replace("mfu (median)", "")  # no machine has a peak
    assert "<b>" not in text
    assert "b" not in page.tags
    # One file, which asks for nothing: what looks like an address names a format.
    assert not re.findall(r'(?:src|href)="(?!#)', text)
    assert "<script" not in text
    names = re.findall(r'id="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(names)


def test_a_launch_that_was_killed_has_no_end_on_record(tmp_path: Path) -> None:
    events = [
        event("started", 8.0, 0, ranks=1, hosts=["a"], launched=BEGAN),
        event("started", 108.0, 2, ranks=1, hosts=["a"], launched=BEGAN + 100),
        event("not saved", 109.0, 3, error="disk full"),
        event("failed", 110.0, 3, error="SaveFailedError: disk full"),
    ]
    folder = write_run(tmp_path / "run", events, steps=2)
    found = read_run(folder, read_metrics(folder), [])
    ends = [(round(launch.end - BEGAN), launch.ended) for launch in found.launches]
    assert ends == [(12, ""), (110, "failed")]
    assert found.state == "failed"
    assert found.seconds() == pytest.approx({"steps": 1.0, "saves": 0.0, "starts": 16.0, "else": 5.0})
    assert differences({"a": found, "b": found}) == {}


def test_what_comes_after_the_end_of_a_launch_is_not_of_it(tmp_path: Path) -> None:
    refused = event("refused", 200_000.0, 6, error="InputError: no")
    folder = write_run(tmp_path / "_odd $a$ name_$^", [*WHOLE, refused])
    found = read_run(folder, read_metrics(folder), [])
    assert found.state == "finished"
    assert [round(launch.end - BEGAN) for launch in found.launches] == [17]
    assert found.seconds()["else"] < 10
    run_successfully("launch/report.py", folder)
    assert any(row[1:3] == ["refused", "6"] for row in Tables((folder / "report.html").read_text()).rows)


def test_clocks_may_disagree_and_a_fresh_start_begins_anew(tmp_path: Path) -> None:
    other = event("started", -500.0, 6, ranks=1, hosts=["b"], launched=BEGAN - 400.0)
    found = read_run(folder := write_run(tmp_path / "run", [*WHOLE, other]), read_metrics(folder), [])
    assert [launch.ended for launch in found.launches] == ["finished", ""]
    assert all(launch.end >= launch.begin for launch in found.launches)
    assert min(found.seconds().values()) >= 0
    run_successfully("launch/report.py", folder)
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*WHOLE, *WHOLE[:2]]))
    assert len(read_run(folder, read_metrics(folder), []).launches) == 1


def test_a_run_of_an_earlier_version_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], steps=2)
    (folder / "events.jsonl").unlink()
    (folder / "notes.json").write_text("[1]")
    (folder / "metrics.jsonl").write_text('{"step": 3, "tokens": 9, "ledger": "0"}\n')
    run_successfully("launch/report.py", folder)
    page = Tables((folder / "report.html").read_text())
    assert page.row("state") == ["running, or ended without a word"]
    assert page.row("steps") == ["3 of 6"]
    assert not any(row and row[0] == "tokens per second (median)" for row in page.rows)


def test_a_run_writes_its_events(sharded_text: ShardedText, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*map(str, Layout().options(sharded_text, folder)), "--training.steps=4", "--checkpoint.every_steps=2"]
    train(parse(words, ""))
    train(parse([*words, "--training.steps=6", "--resume=auto", "--allow-rate-jump"], ""))
    done = run("launch/pretrain_ecp.py", *words, "--training.steps=8", "--resume=auto", "--optimizer.learning_rate=1e9")
    assert done.returncode != 0  # the jump of the rate is refused, before anything has started
    (folder / "stop").touch()
    train(parse([*words, "--training.steps=9", "--resume=auto", "--allow-rate-jump"], ""))
    told = [(found["event"], found["step"]) for found in read_events(folder)]
    first = [("started", 0), ("saved", 2), ("saved", 4), ("finished", 4)]
    assert told[:7] == [*first, ("started", 4), ("saved", 6), ("finished", 6)]
    assert told[7] == ("refused", 6)
    assert "rate" in read_events(folder)[7]["error"]
    assert told[8] == ("started", 6)
    times = [record["time"] for record in metrics(folder)]
    assert times == sorted(times)
    run_successfully("launch/report.py", folder)
    assert Tables((folder / "report.html").read_text()).row("steps")[0].startswith(f"{len(times)} of ")


def test_events_that_cannot_be_written_or_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    EventLog(tmp_path).add("started", 0)
    (tmp_path / "events.jsonl").rmdir()
    with EventLog(tmp_path) as events:
        events.add("started", 3)
    with pytest.raises(ZeroDivisionError), EventLog(tmp_path):
        print(1 / 0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('[1]\n{"event": 3}\nno json\n{"event": "sa')
    told = [("started", 3), ("refused", 0)]
    assert [(found["event"], found["step"]) for found in read_events(tmp_path)] == told
    log = EventLog(tmp_path, 7)
    log.add("started", 7)
    with pytest.raises(ZeroDivisionError), log:
        print(1 / 0)
    found = [(found["event"], found["step"]) for found in read_events(tmp_path)]
    assert found == [*told, ("started", 7), ("failed", 7)]  # though the line before them is half a one
    EventLog(None).add("started", 0)


def test_other_folders_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    whole = write_run(tmp_path / "whole", WHOLE)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("no")
    other = write_run(tmp_path / "other", WHOLE)
    (other / "config.yaml").write_text("- a\n")
    for words, message in (
        ((tmp_path / "empty",), "empty: expected a run with metrics.jsonl, found no record of a step"),
        ((tmp_path / "none",), "none: expected a run with metrics.jsonl"),
        ((whole, whole), "whole is named twice"),
        ((other,), "config.yaml: not the config of a run, which has sections of fields"),
        ((whole, "--results", tmp_path / "list.json"), "list.json: found a list, expected an object"),
        ((whole, "--results", tmp_path / "text.json"), "text.json: not valid JSON"),
        ((whole, "--results", tmp_path / "gone.json"), "gone.json: No such file"),
        ((whole, "--output", tmp_path / "page.txt"), "expected a name that ends in .html"),
        ((whole, "--output", tmp_path / "no" / "page.html"), "page.html: No such file"),
    ):
        done = run("launch/report.py", *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_at_the_width_of_a_telephone(width: int, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", WHOLE)
    run_successfully("launch/report.py", folder)
    picture = tmp_path / "page.png"
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", f"--screenshot={picture}")
    subprocess.run(["chromium", *options, f"file://{folder}/report.html"], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 10_000
