"""What the doctor has found, and the one table that it makes of it."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

Verdict: TypeAlias = Literal["ok", "note", "bad"]
SHOWN = 4
"""Places of one finding that are named; the others are counted."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    check: str
    verdict: Verdict
    text: str


def ok(check: str, text: str) -> Finding:
    """Something that is as it should be."""
    return Finding(check, "ok", text)


def note(check: str, text: str) -> Finding:
    """Something that may be meant, but often is not."""
    return Finding(check, "note", text)


def bad(check: str, text: str) -> Finding:
    """Something with which a run fails, or is slow."""
    return Finding(check, "bad", text)


class Placed(NamedTuple):
    """A finding and where it holds: a host, a rank, or a link."""

    place: str
    finding: Finding


def has_bad(found: Iterable[Placed]) -> bool:
    """Whether anything is bad."""
    return any(one.finding.verdict == "bad" for one in found)


def table(found: Sequence[Placed]) -> str:
    """A line for each different finding, by check in the order of the first ones, with the places that share it."""
    places: dict[Finding, list[str]] = {}
    for place, finding in found:
        places.setdefault(finding, []).append(place)
    checks = list(dict.fromkeys(finding.check for _, finding in found))
    everywhere = {place for place, _ in found}
    lines = []
    for check in checks:
        of_check = {finding: at for finding, at in places.items() if finding.check == check}
        for finding, at in of_check.items():
            where = "" if len(of_check) == 1 and finding.verdict == "ok" else f"  [{_few(at)}]"
            lines.append(f"{finding.verdict:6}{check:20}{finding.text}{where}")
    wrong = sum(finding.verdict == "bad" for finding in places)
    verdict = "all is well" if not wrong else f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong"
    return "\n".join([*lines, f"{verdict}: {_hosts(everywhere)}"])


def _few(places: Sequence[str]) -> str:
    names = list(dict.fromkeys(places))
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _hosts(places: Iterable[str]) -> str:
    hosts = {place for place in places if " " not in place}
    return f"{len(hosts)} host{'' if len(hosts) == 1 else 's'}"
