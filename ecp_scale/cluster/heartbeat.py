"""Rendezvous and failure detector: a rank that does not come, or dies, is named with its host.

Ranks tell each other through the key-value store that the launch has anyway, never through a collective, which would
wait for the missing one. A thread of every rank sends a heartbeat each second and looks for failures, so a rank that
waits in a collective for ever (or in a kernel of NCCL, which raises nothing) stops too. With its heartbeat a rank tells
what it is at: one that hangs in a kernel is alive, and is the one that still computes where others wait.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from ecp_scale.cluster.progress import Progress, progress
from ecp_scale.cluster.ranks import Process, Ranks, expected_hosts
from ecp_scale.console import say
from ecp_scale.errors import AgreedError, InputError, LostRankError

HEARTBEAT_SECONDS = 1.0
"""Between two heartbeats."""
GRACE_SECONDS = 5.0
"""How long a failure may take to be announced, and a rank to stop by itself after that."""
NOTICE_SECONDS = 5.0
"""After which the first rank says for whom the launch waits."""


class FailureDetector:
    """Finds ranks of a launch that are missing, dead or silent.

    Args:
        ranks: this process's place.
        timeout_seconds: how long the launch waits for a rank to come. One without a heartbeat for half as long is
            taken for lost: before the collectives, which wait the whole time, give up without a name.

    Raises:
        LostRankError: if the first rank, which serves the store, does not answer in that time.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: int) -> None:
        self.ranks = ranks
        self.timeout_seconds = timeout_seconds
        self.store = self._connect()
        """For the process group."""
        # Trap: a store serves one call at a time, and those of a process group may wait in it for long.
        self._store = dist.PrefixStore("failure_detector", self._connect())
        self._processes: dict[int, Process] = {}
        self._local_processes: dict[int, Process] = {}
        self._ended = threading.Event()
        self._beats = 0
        self._noticed_at: int | None = None

    def wait_for_all(self) -> None:
        """Wait until all ranks have come.

        Raises:
            LostRankError: on all that have, naming those that have not.
        """
        try:
            self._processes = self._arrived()
        except dist.DistNetworkError as error:
            text = f"rank 0 on host {os.environ['MASTER_ADDR']} has gone before all ranks had come"
            raise LostRankError(text, reports=self.ranks.local_rank == 0) from error
        here = self._processes[self.ranks.rank].host
        # A process that cannot be seen now runs in another container under the same name.
        self._local_processes = {
            rank: process for rank, process in self._processes.items() if process.host == here and process.is_seen()
        }

    def check_one_rank_per_gpu(self, gpu: str) -> None:
        """Refuse ranks that share a GPU; all ranks take part, each with what tells its GPU from others.

        Raises:
            AgreedError: on all ranks, naming those that share.
        """
        users: dict[str, list[int]] = {}
        try:
            for rank, other in enumerate(self._told("gpu", gpu)):
                users.setdefault(other, []).append(rank)
            self._store.set(f"gpu_read/{self.ranks.rank}", "")
            if self.ranks.rank == 0:  # which takes the store with it when it ends
                readers = [f"gpu_read/{rank}" for rank in range(self.ranks.world_size)]
                self._store.wait(readers, timedelta(seconds=self.timeout_seconds))
        except dist.DistError as error:
            raise LostRankError("a rank was lost before the launch began", self._reports()) from error
        shared = {other: ranks for other, ranks in users.items() if other and len(ranks) > 1}
        if shared:
            lines = [f"  - {', '.join(map(self._name, ranks))}: {other}" for other, ranks in shared.items()]
            raise AgreedError("ranks share a GPU, expected one each:\n" + "\n".join(lines))

    def _told(self, what: str, mine: str) -> list[str]:
        """What every rank tells of itself; all ranks take part."""
        self._store.set(f"{what}/{self.ranks.rank}", mine)
        keys = [f"{what}/{rank}" for rank in range(self.ranks.world_size)]
        self._store.wait(keys, timedelta(seconds=self.timeout_seconds))
        return [value.decode() for value in self._store.multi_get(keys)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the other ranks while the body runs, and after it has failed until ``end``.

        Raises:
            LostRankError: in place of the error of a collective, if another rank is lost.
        """
        threading.Thread(target=self._watch, daemon=True, name="failure detector").start()
        try:
            yield
        except Exception as error:
            failure = self._failure_behind(error)
            if failure is not None:
                # The launcher has seen it too, and asks those that are left to end: they will, when they have said why.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise LostRankError(failure, self._reports()) from error
            raise
        self.end()

    def end(self) -> None:
        """Stop watching: from now on others may leave."""
        self._ended.set()

    def _connect(self) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun serves the store itself.
        serves = self.ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        wait = timedelta(seconds=self.timeout_seconds)
        try:
            return dist.TCPStore(
                address, port, is_master=serves, timeout=wait, wait_for_workers=False, multi_tenant=True
            )
        except dist.DistError as error:
            if serves and "EADDRINUSE" in str(error):
                raise InputError(
                    f"port {port} of host {address} is in use, perhaps by another launch; give this one a port of its "
                    "own: deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N"
                ) from error
            raise LostRankError(
                f"rank 0 on host {address} did not answer at port {port} within parallel.timeout_seconds = "
                f"{self.timeout_seconds}",
                reports=self.ranks.local_rank == 0 or self.ranks.rank == 1,
            ) from error

    def _arrived(self) -> dict[int, Process]:
        self._store.set(f"heartbeat/{self.ranks.rank}", self._heartbeat())
        self._store.set(f"process/{self.ranks.rank}", json.dumps(asdict(Process.this())))
        keys = [f"process/{rank}" for rank in range(self.ranks.world_size)]
        deadline = time.monotonic() + self.timeout_seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(dist.DistStoreError):  # so it says that time is over
                self._store.wait(keys, timedelta(seconds=min(left, NOTICE_SECONDS)))
                break
            if self.ranks.rank == 0 and left > NOTICE_SECONDS:
                waited = self.timeout_seconds - left + NOTICE_SECONDS
                say(f"after {waited:.0f} s the launch waits for {self._missing(keys)}")
        missing = self._missing(keys)
        if missing:
            text = f"{missing} did not come within parallel.timeout_seconds = {self.timeout_seconds}"
            raise LostRankError(text, self._reports())
        return {rank: self._process(key) for rank, key in enumerate(keys)}

    def _process(self, key: str) -> Process:
        return Process(**json.loads(self._store.get(key)))

    def _missing(self, keys: list[str]) -> str:
        """Ranks that have not come with the hosts where they should be, as text."""
        came = {rank: self._process(key).host for rank, key in enumerate(keys) if self._store.check([key])}
        hosts = expected_hosts(came)
        absent: dict[str, list[str]] = {}
        for rank in range(len(keys)):
            if rank not in came:
                absent.setdefault(hosts.get(rank, "not known"), []).append(str(rank))
        return "; ".join(f"rank {', '.join(ranks)} of {len(keys)} (host {host})" for host, ranks in absent.items())

    def _reports(self) -> bool:
        """Whether this rank reports for its host: the first one there that is alive."""
        alive = [rank for rank, process in self._local_processes.items() if process.is_seen()]
        return self.ranks.rank == min(alive) if alive else self.ranks.local_rank == 0

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.ranks.world_size} on host {self._processes[rank].host}"

    def _announce(self, text: str) -> str:
        """Tell all ranks of a failure; the first one that is announced stands."""
        return self._store.compare_set("lost", "", text).decode()

    def _watch(self) -> None:
        heartbeats: dict[int, tuple[bytes, float]] = {}
        while not self._ended.wait(HEARTBEAT_SECONDS):
            failure = self._look(heartbeats)
            # The body may be about to stop by itself, with a better place to say so.
            if failure is not None and not self._ended.wait(GRACE_SECONDS):
                if self._reports():
                    say(f"stopped: {failure}")
                os._exit(1)

    def _look(self, heartbeats: dict[int, tuple[bytes, float]]) -> str | None:
        """Send a heartbeat; return the failure of a rank, if there is one.

        ``heartbeats`` holds the last one of every rank and when it was new. Only the first rank reads those of all.
        """
        dead = self._dead_process()
        if dead is not None:
            with suppress(dist.DistError):
                return self._announce(dead)
            return dead
        try:
            self._store.set(f"heartbeat/{self.ranks.rank}", self._heartbeat())
            if self._store.check(["lost"]):
                return self._store.get("lost").decode()
            if self.ranks.rank == 0:
                silent = self._silent(heartbeats, self.timeout_seconds / 2)
                if silent:
                    return self._announce(silent)
                self._notice_who_is_behind(heartbeats)
        except dist.DistError:
            time.sleep(HEARTBEAT_SECONDS / 4)  # a connection ends before the process is seen to
            return self._dead_process() or f"{self._name(0)} is gone: its store does not answer"
        return None

    def _dead_process(self) -> str | None:
        """A rank of this host that has died, as text."""
        for rank, process in self._local_processes.items():
            if not process.is_seen():
                return f"{self._name(rank)} (process {process.pid}) has died"
        return None

    def _silent(self, heartbeats: dict[int, tuple[bytes, float]], patience: float) -> str | None:
        """Who has sent no heartbeat for ``patience`` seconds, as text."""
        now = time.monotonic()
        for rank, heartbeat in enumerate(self._store.multi_get([f"heartbeat/{rank}" for rank in self._processes])):
            if heartbeats.setdefault(rank, (heartbeat, now))[0] != heartbeat:
                heartbeats[rank] = (heartbeat, now)
        lost = [rank for rank, (_, since) in heartbeats.items() if now - since >= patience]
        return f"{'; '.join(map(self._name, lost))} sent no heartbeat for {patience:.0f} s" if lost else None

    def _heartbeat(self) -> str:
        """A number that grows, and what this rank is at."""
        self._beats += 1
        return json.dumps([self._beats, *progress()])

    def _behind(self) -> str | None:
        """Which ranks are behind the others, as text; None where none is."""
        keys = [f"heartbeat/{rank}" for rank in self._processes]
        found = [Progress(*json.loads(heartbeat)[1:]) for heartbeat in self._store.multi_get(keys)]
        least, most = min(found, key=lambda one: one.place), max(found, key=lambda one: one.place)
        if least.place == most.place:
            return None
        names = [self._name(rank) for rank, one in enumerate(found) if one.place == least.place]
        return f"{'; '.join(names)} {least}, where another {most}"

    def _notice_who_is_behind(self, heartbeats: dict[int, tuple[bytes, float]]) -> None:
        """Say once for each step who keeps the others waiting."""
        stuck = min(Progress(*json.loads(heartbeat)[1:]).seconds for heartbeat, _ in heartbeats.values())
        step = progress().step
        if stuck >= self.timeout_seconds / 2 and step != self._noticed_at:
            behind = self._behind()
            if behind is not None:
                self._noticed_at = step
                say(f"waiting     {behind}")

    def _failure_behind(self, error: Exception) -> str | None:
        """Who was lost before ``error``; None where it is this rank's own, which is announced to the others."""
        # gloo raises a plain RuntimeError, NCCL one of torch's classes.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            heartbeats: dict[int, tuple[bytes, float]] = {}
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline:
                failure = self._look(heartbeats)
                if failure is None:
                    with suppress(dist.DistError):
                        silent = self._silent(heartbeats, GRACE_SECONDS - HEARTBEAT_SECONDS)
                        failure = self._announce(silent) if silent else None
                if failure is not None:
                    return failure
                time.sleep(HEARTBEAT_SECONDS / 2)
            with suppress(dist.DistError):
                behind = self._behind()
                if behind is not None:
                    return self._announce(f"{behind}; {str(error).partition(chr(10))[0]}")
        with suppress(dist.DistError):
            first_line = str(error).partition("\n")[0]
            self._announce(f"{self._name(self.ranks.rank)} stopped with {type(error).__name__}: {first_line}")
        return None
