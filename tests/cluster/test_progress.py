"""What a rank tells of itself is what its device has done, not what the host has queued."""

import pytest

from ecp_scale.cluster import progress as module
from ecp_scale.cluster.progress import COMPUTES, WAITS, Progress, progress, report_progress


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPORTS", module._Reports())


def test_a_report_waits_for_the_device_and_for_those_before_it() -> None:
    done = [True, False, True]
    report_progress(3, 0, COMPUTES, lambda: done[0])
    report_progress(3, 1, "has done forward pass 1 of", lambda: done[1])
    report_progress(3, 2, WAITS, lambda: done[2])
    assert progress().place == (3, 0)
    done[1] = True
    assert progress().place == (3, 2)
    assert str(progress()).startswith("waits for the others in step 3, for 0 s")


def test_further_is_larger() -> None:
    assert Progress(3, 0).place < Progress(3, 1).place < Progress(4, 0).place
