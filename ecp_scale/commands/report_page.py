"""The page of a report: one file of HTML, with pictures as SVG inside."""

import html
import io
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ecp_scale.commands.plot import PANELS, draw_panel, legend
from ecp_scale.commands.report import RunRecord, differences
from ecp_scale.evaluation.comparison import pyplot

SMOOTHING = 0.9
FOLDED = 30
"""Events beyond which their table is folded."""
NUMBERS = itertools.count()
"""Of pictures."""
MARKS = (("saved", "|", "k"), ("not saved", "x", "C3"), ("spike", "^", "C1"), ("rolled back", "<", "C4"))
"""Events on the time line, with their mark and colour."""
MORE_PANELS = {
    "validation_bits_per_byte": "validation bits per byte",
    "validation_accuracy": "validation accuracy",
    "mfu": "model FLOPs utilisation",
    "peak_memory_bytes": "peak memory of rank 0 (bytes)",
}
STYLE = """
:root { color-scheme: light; --line: #d8dde3; --soft: #5b6673; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; color: #1b2430; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
.wide { max-width: 44rem; }
"""


def page(runs: dict[str, RunRecord]) -> str:
    """The whole page of some runs by name."""
    title = " and ".join(runs) if len(runs) < 3 else f"{len(runs)} runs"
    parts = [
        _section("Runs", _summary(runs)),
        _section("Curves", _curves(runs), "against tokens; smoothed, with what was measured behind"),
        _section("By position", _by_position(runs), "validation loss by position in a window, newest"),
        _section("Evaluations", "".join(_results(name, run) for name, run in runs.items())),
        _section("Differences of config", _differences(runs)),
        _section("What happened", "".join(_events(name, run) for name, run in runs.items())),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n<p>written {_clock(time.time())}</p>\n{''.join(parts)}</body></html>\n"
    )


def _section(title: str, content: str, remark: str = "") -> str:
    if not content:
        return ""
    return f"<h2>{title}</h2>\n{f'<p>{remark}</p>' if remark else ''}{content}\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers stand on the right."""

    def cell(tag: str, value: Any, right: bool) -> str:
        kind = ' class="number"' if right else ""
        return f"<{tag}{kind}>{html.escape(_said(value))}</{tag}>"

    right = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(header))]
    lines = ["".join(cell("th", name, is_right) for name, is_right in zip(header, right, strict=True))]
    lines += ["".join(cell("td", value, is_right) for value, is_right in zip(row, right, strict=True)) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>\n"


def _said(value: Any) -> str:
    """A value as a reader wants it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4f}" if size >= 0.01 or not size else f"{value:.3g}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _time(run: RunRecord, name: str) -> str | None:
    return _span(run.seconds()[name]) if run.launches else None


def _summary(runs: dict[str, RunRecord]) -> str:
    """A column for each run: what it is, how far, how good, how fast."""
    lines: dict[str, Callable[[RunRecord], Any]] = {
        "state": lambda run: run.state,
        "steps": lambda run: f"{run.last['step']:,} of {run.planned_steps:,}",
        "tokens": lambda run: run.last["tokens"],
        "loss (last)": lambda run: run.last.get("loss"),
        "validation loss (last)": lambda run: next(iter(run.values("validation_loss")[-1:]), None),
        "validation loss (best)": lambda run: min(run.values("validation_loss"), default=None),
        "bits per byte (last)": lambda run: next(iter(run.values("validation_bits_per_byte")[-1:]), None),
        "tokens per second (median)": lambda run: run.median("tokens_per_second"),
        "MFU (median)": lambda run: run.median("mfu"),
        "peak memory of rank 0 (GB)": lambda run: max(run.values("peak_memory_bytes"), default=math.nan) / 1e9,
        "skipped updates": lambda run: run.last.get("skipped_steps"),
        "launches": lambda run: len(run.launches) or None,
        **{f"time in {name}": partial(_time, name=name) for name in ("steps", "saves", "starts", "else")},
        "slow steps": lambda run: len(run.slow_steps()),
        "data digest": lambda run: run.last.get("data_digest"),
        "folder": lambda run: run.folder,
    }
    rows = [[name, *(_said(of(run)) for run in runs.values())] for name, of in lines.items()]
    return _table(["", *runs], [row for row in rows if set(row[1:]) != {"-"}])


def _picture(draw: Callable[[Any], None], size: tuple[float, float] = (5.2, 3.2)) -> str:
    """What is drawn, as SVG; names inside of it are its own, since a page has several."""
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    draw(axes)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot().close(figure)
    svg = file.getvalue()
    prefix = f"picture{next(NUMBERS)}-"
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg[svg.index("<svg") :])
    return f"<figure>{svg}</figure>\n"


def _curves(runs: dict[str, RunRecord]) -> str:
    steps = {name: run.steps for name, run in runs.items()}

    def draw(axes: Any, key: str, label: str) -> None:
        draw_panel(axes, key, steps, SMOOTHING)
        axes.set(title=label, xlabel="tokens (millions)")
        if len(runs) > 1:
            legend(axes)

    panels = {**PANELS, **MORE_PANELS}.items()
    shown = [(key, label) for key, label in panels if any(run.values(key) for run in runs.values())]
    pictures = [_picture(partial(draw, key=key, label=label)) for key, label in shown]
    return f'<div class="pictures">{"".join(pictures)}</div>'


def _by_position(runs: dict[str, RunRecord]) -> str:
    newest = {name: run.values("validation_by_position") for name, run in runs.items()}
    found: dict[str, Any] = {name: values[-1] for name, values in newest.items() if values}
    if not found:
        return ""

    def draw(axes: Any) -> None:
        for name, buckets in found.items():
            axes.plot([first + 1 for first, _, _ in buckets], [loss for _, _, loss in buckets], "o-", label=name)
        axes.set(title="validation loss", xlabel="first position of a bucket, from 1 on", xscale="log")
        axes.grid(alpha=0.3)
        legend(axes)

    return f'<div class="pictures">{_picture(draw)}</div>'


def _results(name: str, run: RunRecord) -> str:
    """The numbers of each evaluation."""
    parts = []
    for file, content in run.results.items():
        rows = [[key, value] for key, value in content.items() if isinstance(value, int | float | str)]
        if rows:
            parts.append(f"<h3>{html.escape(f'{name}: {file}')}</h3>\n{_table(['', ''], rows)}")
    return "".join(parts)


def _differences(runs: dict[str, RunRecord]) -> str:
    if len(runs) == 1:
        return ""
    rows = [[field, *map(_said, values)] for field, values in differences(runs).items()]
    return _table(["", *runs], rows) if rows else "<p>none</p>"


def _events(name: str, run: RunRecord) -> str:
    """The time line of a run, its events in words, and its slow steps."""
    parts = [f"<h3>{html.escape(name)}</h3>\n"]
    if run.launches:
        parts.append(f'<div class="wide">{_picture(lambda axes: _draw_launches(axes, run), (8, 1.9))}</div>')
    rows = [[_clock(event["time"]), event["event"], event["step"], _details(event)] for event in run.events]
    table = _table(["time", "event", "after step", ""], rows) if rows else "<p>no events on record</p>"
    if len(rows) > FOLDED:
        table = f"<details><summary>{len(rows)} events</summary>{table}</details>"
    parts.append(table)
    slow = run.slow_steps()
    if slow:
        median = run.median("step_seconds")
        rows = [[record["step"], record["step_seconds"], record["step_seconds"] / median] for record in slow[:10]]
        parts.append(f"<p>{len(slow)} steps took three times the median of {median:.3g} s and more, the slowest:</p>")
        parts.append(_table(["step", "seconds", "times the median"], rows))
    return "".join(parts)


def _details(event: dict[str, Any]) -> str:
    left = {key: value for key, value in event.items() if key not in ("event", "time", "step", "launched")}
    return ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else _said(value)}"
        for key, value in left.items()
    )


def _draw_launches(axes: Any, run: RunRecord) -> None:
    """Launches as bars from left to right, saves and failures as marks."""
    first = min(launch.begin for launch in run.launches)
    colors = {"finished": "C2", "stopped": "C0", "failed": "C3"}
    for launch in run.launches:
        begin, end = ((time - first) / 60 for time in (launch.begin, launch.end))
        axes.barh(0, end - begin, left=begin, height=0.5, color=colors.get(launch.ended, "0.6"), alpha=0.5)
    for kind, mark, color in MARKS:
        times = [(event["time"] - first) / 60 for event in run.events if event["event"] == kind]
        if not times and kind not in ("saved", "not saved"):
            continue
        axes.plot(times, [0.0] * len(times), mark, color=color, markersize=12, label=kind)
    axes.set(yticks=[], xlabel="minutes since the first launch", ylim=(-0.6, 0.9))
    axes.set_title("launches: green finished, blue stopped, red failed, grey without an end on record", fontsize=9)
    axes.legend(fontsize=8, ncol=4, loc="upper right")
