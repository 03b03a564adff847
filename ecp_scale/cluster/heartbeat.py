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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ecp_scale.cluster.last_words import leave, say_last_words
from ecp_scale.cluster.meeting import POLL_SECONDS, Meeting
from ecp_scale.cluster.progress import Progress, progress
from ecp_scale.cluster.ranks import Process, Ranks
from ecp_scale.console import say
from ecp_scale.errors import InputError, LostRankError

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

    def __init__(self, ranks: Ranks, timeout_seconds: int, process: Process | None = None) -> None:
        self.ranks = ranks
        self.timeout_seconds = timeout_seconds
        self.meeting = Meeting(
            self._connect(), ranks.rank, ranks.world_size, process or Process.this(), self._store_answered
        )
        self._answered = time.monotonic()
        self._local_processes: dict[int, Process] = {}
        self._ended = threading.Event()
        self._beats = 0
        self._noticed_at: int | None = None

    @property
    def store(self) -> dist.Store:
        """For the process group, once all have come; a connection of its own.

        Trap: a connection serves one call at a time, and those of a process group may wait in it for long.
        """
        return dist.PrefixStore(f"group {self.meeting.attempt}", self._connect())

    def wait_for_all(self) -> None:
        """Wait until all ranks have come.

        Raises:
            LostRankError: on all that have, naming those that have not.
        """
        self._store_answered()  # what came before, as the wait for the store itself, does not count
        threading.Thread(target=self._watch_the_store, daemon=True, name="store watch").start()
        deadline = time.monotonic() + self.timeout_seconds
        try:
            if not self.meeting.come(deadline, self._notice_who_is_missing(), heartbeat=self._heartbeat()):
                raise LostRankError(self._who_did_not_come(), self._reports())
        except dist.DistError as error:
            text = f"rank 0 on host {os.environ['MASTER_ADDR']} has gone before all ranks had come"
            raise LostRankError(text, reports=self.ranks.local_rank == 0) from error
        # A process that cannot be seen now runs in another container under the same name.
        self._local_processes = {rank: process for rank, process in self.meeting.local.items() if process.is_seen()}
        threading.Thread(target=self._watch, daemon=True, name="failure detector").start()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the other ranks while the body runs, and after it has failed until ``end``.

        Raises:
            LostRankError: in place of the error of a collective, if another rank is lost.
        """
        try:
            yield
        except Exception as error:
            failure = self._failure_behind(error)
            if failure is not None:
                # The launcher has seen it too, and asks those that are left to end: they will, when they have said why.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                say_last_words()
                if self.ranks.rank == 0:
                    time.sleep(2 * HEARTBEAT_SECONDS)  # until the others have looked: the store may go with this rank
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

    def _notice_who_is_missing(self) -> Callable[[float], None]:
        """On the first rank, says now and then for whom the launch waits."""
        noticed = float(self.timeout_seconds)

        def waiting(left: float) -> None:
            nonlocal noticed
            if self.ranks.rank == 0 and noticed - left >= NOTICE_SECONDS and (missing := self.meeting.missing()):
                noticed = left
                say(f"after {self.timeout_seconds - left:.0f} s the launch waits for {missing}")

        return waiting

    def _who_did_not_come(self) -> str:
        """Ranks that have not come, which the first one knows."""
        limit = f"within parallel.timeout_seconds = {self.timeout_seconds}"
        store = self.meeting.store
        if self.ranks.rank == 0:
            text = self._announce(
                f"{self.meeting.missing() or 'too many ranks came, and so not all'} did not come {limit}"
            )
            time.sleep(POLL_SECONDS + 1)  # until the others have looked: the store may go with this rank
            return text
        if not self.meeting.belongs:
            return f"rank 0 of {self.ranks.world_size} (host {os.environ['MASTER_ADDR']}) did not come {limit}"
        with suppress(dist.DistError):
            store.wait(["lost"], timedelta(seconds=GRACE_SECONDS))
            return store.get("lost").decode()
        return f"not all ranks came {limit}"

    def _reports(self, silent: int | None = None) -> bool:
        """Whether this rank reports for its host: the first one there that is alive, and not ``silent``."""
        alive = [rank for rank, process in self._local_processes.items() if rank != silent and process.is_seen()]
        return self.ranks.rank == min(alive) if alive else self.ranks.local_rank == 0

    def _announce(self, text: str) -> str:
        """Tell all ranks of a failure; the first one that is announced stands."""
        return self.meeting.store.compare_set("lost", "", text).decode()

    def _watch(self) -> None:
        heartbeats: dict[int, tuple[str, float]] = {}
        while not self._ended.wait(HEARTBEAT_SECONDS):
            failure = self._look(heartbeats)
            # The body may be about to stop by itself, with a better place to say so.
            if failure is not None and not self._ended.wait(GRACE_SECONDS):
                if self._reports():
                    say(f"stopped: {failure}")
                leave()

    def _watch_the_store(self) -> None:
        """End this rank where the store, and so the host of the first one, answers no more.

        Trap: what is asked of a store on a host that goes dark is waited for as long as TCP repeats it, a quarter of an
        hour; nothing raises.
        """
        while not self._ended.wait(HEARTBEAT_SECONDS):
            silent = time.monotonic() - self._answered
            if silent >= max(self.timeout_seconds / 2, POLL_SECONDS) + GRACE_SECONDS:
                if self._reports(silent=0):
                    # Before all have met the store would be asked for the name.
                    first = (
                        self.meeting.name(0) if self.meeting.local else f"rank 0 on host {os.environ['MASTER_ADDR']}"
                    )
                    say(f"stopped: {first}: its store has not answered for {silent:.0f} s")
                leave()

    def _store_answered(self) -> None:
        self._answered = time.monotonic()

    def _look(self, heartbeats: dict[int, tuple[str, float]]) -> str | None:
        """Send a heartbeat; return the failure of a rank, if there is one.

        ``heartbeats`` holds the last one of every rank and when it was new. Only the first rank reads those of all.
        """
        dead = self._dead_process()
        if dead is not None:
            with suppress(dist.DistError):
                return self._announce(dead)
            return dead
        try:
            self.meeting.tell("heartbeat", self._heartbeat())
            if self.meeting.store.check(["lost"]):
                return self.meeting.store.get("lost").decode()
            if self.ranks.rank == 0:
                silent = self._silent(heartbeats, self.timeout_seconds / 2)
                if silent:
                    return self._announce(silent)
                self._notice_who_is_behind(heartbeats)
            self._store_answered()
        except dist.DistError:
            time.sleep(HEARTBEAT_SECONDS / 4)  # a connection ends before the process is seen to
            return self._dead_process() or f"{self.meeting.name(0)} is gone: its store does not answer"
        return None

    def _dead_process(self) -> str | None:
        """A rank of this host that has died, as text."""
        for rank, process in self._local_processes.items():
            if not process.is_seen():
                return f"{self.meeting.name(rank)} (process {process.pid}) has died"
        return None

    def _silent(self, heartbeats: dict[int, tuple[str, float]], patience: float) -> str | None:
        """Who has sent no heartbeat for ``patience`` seconds, as text."""
        now = time.monotonic()
        for rank, heartbeat in enumerate(self.meeting.told("heartbeat")):
            if heartbeats.setdefault(rank, (heartbeat, now))[0] != heartbeat:
                heartbeats[rank] = (heartbeat, now)
        lost = [rank for rank, (_, since) in heartbeats.items() if now - since >= patience]
        return f"{'; '.join(map(self.meeting.name, lost))} sent no heartbeat for {patience:.0f} s" if lost else None

    def _heartbeat(self) -> str:
        """A number that grows, and what this rank is at."""
        self._beats += 1
        return json.dumps([self._beats, *progress()])

    def _behind(self) -> str | None:
        """Which ranks are behind the others, as text; None where none is."""
        found = [Progress(*json.loads(heartbeat)[1:]) for heartbeat in self.meeting.told("heartbeat")]
        least, most = min(found, key=lambda one: one.place), max(found, key=lambda one: one.place)
        if least.place == most.place:
            return None
        names = [self.meeting.name(rank) for rank, one in enumerate(found) if one.place == least.place]
        return f"{'; '.join(names)} {least}, where another {most}"

    def _notice_who_is_behind(self, heartbeats: dict[int, tuple[str, float]]) -> None:
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
            heartbeats: dict[int, tuple[str, float]] = {}
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
            self._announce(f"{self.meeting.name(self.ranks.rank)} stopped with {type(error).__name__}: {first_line}")
        return None
