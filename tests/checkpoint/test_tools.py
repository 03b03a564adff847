"""ecp-checkpoint list, diff and prune; verify is in test_damage.py."""

import re
from pathlib import Path

import pytest

from ecp_scale.checkpoint import tools
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.cluster.lock import Lock
from ecp_scale.errors import InputError
from tests.checkpoint.test_folder import write_checkpoint
from tests.checkpoint.test_mirror import hashed_checkpoint, steps
from tests.corpus import ShardedText
from tests.launching import run
from tests.parallel.layouts import Layout, trained

SCRIPT = "launch/checkpoint.py"


def test_the_list_says_what_each_checkpoint_is(sharded_text: ShardedText, tmp_path: Path) -> None:
    lines: list[str] = []
    assert tools.describe(trained(Layout(tensor=2, zero=1), sharded_text), lines.append)
    for part in ("step-00000012  ", " MB  2 ranks, tensor 2, ZeRO-1, fp32  saved 20", "deepspeed 0."):
        assert part in lines[0]
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4, complete=False)
    (tmp_path / "checkpoints" / "step-00000006.partial").mkdir()
    done = run(SCRIPT, "list", tmp_path)
    assert done.returncode == 1
    complete, incomplete, partial = done.stdout.splitlines()
    assert complete.startswith("step-00000002  20 tokens")
    assert "not a complete checkpoint" in incomplete
    assert partial == "step-00000006.partial  being written, or cut short"


def test_differences_are_named_down_to_the_weights(sharded_text: ShardedText) -> None:
    runs = [trained(layout, sharded_text) for layout in (Layout(), Layout(tensor=2, zero=1))]
    lines: list[str] = []
    assert not tools.difference(runs[0], runs[0], lines.append)
    assert len(lines) == 1
    assert re.fullmatch(r"0 of \d\d parameters differ", lines[0])
    lines.clear()
    assert tools.difference(*runs, lines.append)
    assert "world_size: 1, 2" in lines
    assert "zero_stage: 0, 1" in lines
    assert not any(line.startswith(("step", "model.", "data.")) for line in lines)
    # Layouts add up in other orders.
    of_weights = [line for line in lines if "elements, by up to" in line]
    assert of_weights
    assert all(float(line.split("by up to ")[1].split()[0]) < 1e-5 for line in of_weights)
    done = run(SCRIPT, "diff", runs[0], find_checkpoint(runs[1]))
    assert done.returncode == 1
    assert done.stdout.splitlines() == lines


def test_prune_removes_what_it_says_and_nothing_of_a_run_at_work(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        hashed_checkpoint(tmp_path, step)
    done = run(SCRIPT, "prune", tmp_path, "--keep-last", 1, "--keep-every", 4, "--dry-run")
    assert done.stdout.count("would remove") == 2
    assert done.stdout.endswith("2 of 4 complete checkpoints stay\n")
    assert steps(tmp_path) == [2, 4, 6, 8]
    lock = Lock(tmp_path / ".lock")
    lock.take("the test")
    done = run(SCRIPT, "prune", tmp_path, "--keep-last", 1)
    assert done.returncode == 2
    assert "is being written by process" in done.stderr
    lock.release()
    done = run(SCRIPT, "prune", tmp_path, "--keep-last", 1, "--keep-every", 4)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == [4, 8]
    assert run(SCRIPT, "prune", tmp_path, "--keep-last", 0).returncode == 2
    with pytest.raises(InputError, match="found none"):
        tools.prune(tmp_path / "nothing", 1, None, False, print)


def test_damage_is_neither_kept_alone_nor_called_equal(tmp_path: Path) -> None:
    for step in (2, 4):
        hashed_checkpoint(tmp_path, step)
    damaged = next((tmp_path / "checkpoints" / "step-00000004").glob("*.pt"))
    damaged.write_bytes(damaged.read_bytes()[::-1])
    with pytest.raises(
        InputError, match=r"nothing is removed, as what would stay is damaged:\n.*step-00000004/mp_rank"
    ):
        tools.prune(tmp_path, 1, None, False, print)
    assert steps(tmp_path) == [2, 4]
    lines: list[str] = []
    assert tools.difference(tmp_path, tmp_path, lines.append)
    assert "is damaged" in lines[0]
    (tmp_path / "checkpoints" / "step-00000004").rename(tmp_path / "checkpoints" / "step-00000008")
    lines.clear()
    assert not tools.describe(tmp_path, lines.append)
    assert "holds step 4, expected 8 by its name" in lines[1]
    assert steps(tmp_path) == [2]
