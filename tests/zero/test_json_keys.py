"""Every key that a DeepSpeed JSON may have: a run with it works, and computes what a run without it does."""

import json
from pathlib import Path
from typing import Any

import pytest

from ecp_scale.command_line import parse
from ecp_scale.training.loop import train
from ecp_scale.zero.json_config import DECIDED, KNOWN, SIZE
from tests.corpus import ShardedText
from tests.launching import ROOT, metrics
from tests.parallel.layouts import Layout


def stages(key: str) -> tuple[int, ...]:
    """ZeRO stages that a key is tried with."""
    if not key.startswith("zero_optimization."):
        return (2,)
    if "stage3" in key or "offload_param" in key:
        return (3,)
    return (2, 3) if "offload" in key else (1, 3)


CASES = [
    (key, value, stage)
    for key, choice in KNOWN.items()
    if choice != DECIDED and key != "zero_optimization.stage"
    for value in ((2,) if choice == SIZE else choice)
    for stage in stages(key)
]


def losses(text: ShardedText, folder: Path, content: dict[str, Any]) -> list[float]:
    """Losses and norms of three steps with accumulation."""
    file = folder / "deepspeed.json"
    file.write_text(json.dumps(content))
    words = list(map(str, Layout().options(text, folder / "run")))[:-2]
    train(parse([*words, "--training.steps=3", f"--deepspeed_config={file}"], ""))
    return [record[key] for record in metrics(folder / "run") for key in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def plain(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of ZeRO-0."""
    return losses(sharded_text, tmp_path_factory.mktemp("plain"), {})


@pytest.mark.parametrize(("key", "value", "stage"), CASES)
def test_a_known_key_works_and_changes_no_number(
    key: str, value: object, stage: int, plain: list[float], sharded_text: ShardedText, tmp_path: Path
) -> None:
    content: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    section = content
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    if last == "pin_memory":
        section["device"] = "cpu"
    assert losses(sharded_text, tmp_path, content) == pytest.approx(plain, abs=1e-5)


def test_the_documentation_names_every_key() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    missing = [key for key in KNOWN if f"`{key.rpartition('.')[2]}`" not in text]
    assert missing == []
