"""What a scheduler's control groups leave to a process."""

from pathlib import Path

import pytest

from ecp_scale.cluster import host_memory
from ecp_scale.cluster.host_memory import free_memory

MIB = 1 << 20


def group(folder: Path, version: int, most: object, used: int, files: int) -> None:
    """The files of a control group."""
    limit, current, active, inactive = host_memory.GROUP_FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / current).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{active} {files}\n{inactive} 0\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_any_group_around_the_process_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path if version == 2 else tmp_path / "memory"
    (tmp_path / "groups").write_text({1: "4:cpu:/x\n3:memory:/job/step\n", 2: "0::/job/step\n"}[version])
    monkeypatch.setattr(host_memory, "PROC_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "GROUPS_ROOT", tmp_path)
    whole = free_memory()
    group(root / "job" / "step", version, "max", 50 * MIB, 0)
    assert free_memory() == pytest.approx(whole, rel=0.2)
    group(root / "job", version, 100 * MIB, 60 * MIB, 10 * MIB)
    assert free_memory() == 50 * MIB
    group(root / "job" / "step", version, 40 * MIB, 35 * MIB, 2 * MIB)
    assert free_memory() == 7 * MIB
