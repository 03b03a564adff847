"""The list of planted bugs is of the code as it is, and a campaign tells a bug that is found from one that is not."""

import subprocess

import pytest

from tests import mutations
from tests.launching import ROOT
from tests.mutations import BUGS, Bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.file)
def test_every_bug_can_be_planted(bug: Bug) -> None:
    content = (ROOT / "ecp_scale" / bug.file).read_text()
    assert content.count(bug.right) == 1, bug
    for name in bug.tests.split():
        assert name.startswith("-") or not name.startswith("tests/") or (ROOT / name.partition("::")[0]).is_file(), name


def test_a_bug_is_found_or_survives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = "tests/test_learning_rate.py"
    found = Bug("config/optimizer.py", "return peak\n", "return 2 * peak\n", seen)
    survives = Bug("config/optimizer.py", "Peak learning rate.", "Peak rate.", seen)
    monkeypatch.setattr(mutations, "BUGS", (found, survives))
    monkeypatch.setattr("sys.argv", ["mutations"])
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout
    assert mutations.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["found", "SURVIVED", "2"]
    assert said[-1] == "2 bugs, 1 survived"
    assert subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout == before
