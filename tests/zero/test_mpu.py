"""The mpu adapter answers everything that the installed DeepSpeed may ask of it."""

import ast
from pathlib import Path

import deepspeed

from ecp_scale.parallel.groups import Groups
from ecp_scale.zero.mpu import ModelParallelUnit

GUARDED = {
    "get_slice_parallel_group",
    "get_slice_parallel_rank",
    "get_slice_parallel_world_size",
    "get_pipe_parallel_group",
    "get_pipe_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "get_sequence_data_parallel_group",
    "get_sequence_data_parallel_rank",
    "get_sequence_data_parallel_world_size",
}
"""Asked only behind hasattr, or as an older name of something that the adapter has."""
AUTOTP_ONLY = {"_init_tp_mesh_device"}
"""Asked of DeepSpeed's own groups module, which AutoTP puts in place of an mpu."""
MUST_BE_ABSENT = {"initialize_sequence_parallel"}
"""Its presence makes DeepSpeed ignore the data-parallel group."""


def mpu_accesses() -> dict[str, set[str]]:
    """Every ``mpu.NAME`` and ``self.mpu.NAME`` in DeepSpeed's source, with the files that have it."""
    found: dict[str, set[str]] = {}
    root = Path(deepspeed.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name == "mpu":
                found.setdefault(node.attr, set()).add(str(path.relative_to(root)))
    return found


def test_every_access_of_the_installed_deepspeed_is_answered() -> None:
    accesses = mpu_accesses()
    assert "get_data_parallel_group" in accesses
    own = {name for name in dir(ModelParallelUnit) if not name.startswith("_")}
    excused = GUARDED | AUTOTP_ONLY | MUST_BE_ABSENT
    missing = {name: sorted(files) for name, files in accesses.items() if name not in own | excused}
    assert missing == {}
    assert not own & (GUARDED | MUST_BE_ABSENT)


def test_the_adapter_offers_nothing_that_nobody_asks_for() -> None:
    own = {name for name in dir(ModelParallelUnit) if not name.startswith("_")}
    assert own - mpu_accesses().keys() == set()


def test_a_group_of_one_answers_in_kind(groups: Groups) -> None:
    mpu = ModelParallelUnit()
    for name in dir(mpu):
        if name.endswith("world_size"):
            assert getattr(mpu, name)() == 1
        elif name.endswith("rank"):
            assert getattr(mpu, name)() == 0
        elif name.endswith("group"):
            assert getattr(mpu, name)().size() == 1
    assert mpu.get_data_parallel_group_ranks() == [0]
