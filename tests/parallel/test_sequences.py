"""Ranks that share a sequence compute what one process computes, and tell each other one segment per layer."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import run_successfully

SCRIPT = "tests/parallel/share_sequences.py"
HEADS_FOR_FOUR = {"heads": 4, "key_value_heads": 4}


def job(settings: str, masked: bool = False, model: dict[str, Any] | None = None, **parallel: object) -> dict[str, Any]:
    """One check of share_sequences.py."""
    return {"settings": settings, "masked": masked, "model": model or {}, "parallel": parallel}


CHECKS = {
    2: [
        job("paper", context=2),
        job("scaled", context=2),
        job("scaled", masked=True, context=2),
        job("paper", masked=True, context=2, recompute="full"),
        job("scaled", context=2, recompute="selective"),
        job("scaled", model={"architecture": "sliding_window", "window": 16}, context=2),
        job("paper", tensor=2, sequence=True),
        job("scaled", masked=True, tensor=2, sequence=True, recompute="full"),
        job("paper", tensor=2, sequence=True, recompute="selective"),
        # Runs of one segment: the first segment is the last one too.
        job("scaled", model={"segment_length": 16}, context=2),
    ],
    4: [
        job("paper", context=4),
        job("scaled", masked=True, context=4, recompute="full"),
        job("paper", tensor=2, sequence=True, context=2),
        job("scaled", masked=True, tensor=2, context=2),
        job("scaled", model={"architecture": "sliding_window", "window": 8}, tensor=2, sequence=True, context=2),
        job("paper", model=HEADS_FOR_FOUR, tensor=4, sequence=True),
    ],
}


TWO_PASSES = [{"two_passes": recompute} for recompute in ("none", "selective", "full")]
LENGTHS = {"lengths": [1024, 4096, 65_536], "segment_length": 256}


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_number_equals_that_of_one_process_in_float64_and_messages_are_one_segment(
    ranks: int, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([*CHECKS[ranks], LENGTHS, *TWO_PASSES]))
    run_successfully(SCRIPT, jobs, ranks=ranks)
