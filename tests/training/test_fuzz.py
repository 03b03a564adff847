"""300 odd starts; ten thousand are ``python -m tests.training.fuzz --starts 10000``."""

from pathlib import Path

from tests.training.fuzz import campaign


def test_odd_starts_reach_the_model_or_end_as_one_message(tmp_path: Path) -> None:
    counts, wrong = campaign(300, 1, tmp_path)
    assert wrong == []
    # Both happen, or the fuzzer tests nothing.
    assert counts["reached"] > 20
    assert counts["refused"] > 100
