"""The lock of a folder, on file systems whose own locks are known to one host only, or outlive their holder."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import filelock
import pytest

from ecp_scale.cluster import lock as locking
from ecp_scale.cluster.lock import Lock
from ecp_scale.errors import InputError


class KnownToOneHost:
    """A lock of the file system that every host gets."""

    def __init__(self, path: Path, blocking: bool) -> None:
        self.is_locked = False

    def acquire(self) -> None:
        self.is_locked = True

    def release(self) -> None:
        self.is_locked = False


class OfADeadHost(KnownToOneHost):
    """A lock of the file system that nobody gets."""

    def acquire(self) -> None:
        raise filelock.Timeout("held")


@pytest.fixture(params=[KnownToOneHost, OfADeadHost])
def odd_locks(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filelock, "FileLock", request.param)
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(locking, "PATIENCE_SECONDS", 1.0)


def holder_of(path: Path, host: str, pid: int) -> Path:
    holder = path.with_name(path.name + ".holder")
    holder.write_text(f"{pid}\n{host}\n1.0\n2026-01-01 00:00:00 UTC\nabc\n")
    return holder


@pytest.mark.usefixtures("odd_locks")
def test_a_holder_on_another_host_that_sends_heartbeats_is_left_alone(tmp_path: Path) -> None:
    holder = holder_of(tmp_path / "lock", "elsewhere", 5)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.1):
            os.utime(holder)

    thread = threading.Thread(target=beat)
    thread.start()
    watched: list[str] = []
    try:
        with pytest.raises(InputError, match="x: is being written by process 5 on elsewhere since 2026"):
            Lock(tmp_path / "lock").take("x", watched.append)
    finally:
        done.set()
        thread.join()
    assert watched == ["process 5 on elsewhere since 2026-01-01 00:00:00 UTC"]
    assert "elsewhere" in holder.read_text()


@pytest.mark.usefixtures("odd_locks")
def test_a_holder_on_another_host_without_heartbeats_is_taken_for_dead(tmp_path: Path) -> None:
    holder = holder_of(tmp_path / "lock", "elsewhere", 5)
    lock = Lock(tmp_path / "lock")
    assert lock.take("x") == "process 5 on elsewhere since 2026-01-01 00:00:00 UTC"
    assert holder.read_text().startswith(f"{os.getpid()}\n")
    lock.release()
    assert not holder.exists()


def test_the_holder_on_this_host_is_known_by_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filelock, "FileLock", KnownToOneHost)
    lock, other = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    lock.take("x")
    with pytest.raises(InputError, match=f"process {os.getpid()} on "):
        other.take("x")
    other.release()
    assert (tmp_path / "lock.holder").exists()
    lock.release()
    assert other.take("x") is None
    other.release()


def test_a_holder_goes_on_sending_heartbeats_until_it_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.02)
    lock = Lock(tmp_path / "lock")
    lock.take("x")
    holder = tmp_path / "lock.holder"
    before = holder.stat().st_mtime_ns
    deadline = time.monotonic() + 20
    while holder.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # What another has taken over stays his.
    holder.write_text("6\nelsewhere\n1.0\nnow\nabc\n")
    lock.release()
    assert holder.read_text().startswith("6\n")
