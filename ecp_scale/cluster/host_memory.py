"""How much memory a host has left for this process."""

import sys
from contextlib import suppress
from pathlib import Path

import psutil

PROC_GROUPS = Path("/proc/self/cgroup")
GROUPS_ROOT = Path("/sys/fs/cgroup")
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file"),
    2: ("memory.max", "memory.current", "active_file", "inactive_file"),
}
"""By version of control groups: the files of limit and use, and the entries of memory.stat."""


def free_memory() -> int:
    """Bytes that this host, or a control group that a scheduler has put this process into, has left."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError):
        for line in PROC_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version = 2 if not controllers else 1 if "memory" in controllers.split(",") else None
            if version is None:
                continue
            root = GROUPS_ROOT if version == 2 else GROUPS_ROOT / "memory"
            folder = root / path.strip("/")
            # A scheduler limits a job; the process is in a group of its step or task, within that.
            for group in (folder, *folder.parents):
                free = min(free, _left_in_group(group, version))
                if group == root:
                    break
    return free


def _left_in_group(group: Path, version: int) -> int:
    limit, used, active, inactive = GROUP_FILES[version]
    try:
        most, in_use = (int((group / name).read_text()) for name in (limit, used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files in memory go when it is needed.
        return most - in_use + int(stat[active]) + int(stat[inactive])
    except (OSError, ValueError, KeyError):  # no limit, or no such group seen from here
        return sys.maxsize
