"""How the ranks of a launch meet, by its key-value store: a fixed number of messages for each, however many they are.

A launcher that starts ranks again (torchrun --max-restarts) keeps its store, with all that the ranks before have left
in it. So every attempt has keys of its own, and the first rank says which attempt is the newest.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from ecp_scale.cluster.ranks import Process, expected_hosts

POLL_SECONDS = 5.0
"""The longest wait at a time. torch warns of every one that ends so."""


class Meeting:
    """The ranks of the newest attempt of a launch.

    Args:
        store: of the launch.
        rank: of this process.
        size: how many ranks there are.
        process: where this rank runs.
        alive: called whenever the store has answered.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, process: Process, alive: Callable[[], None] = lambda: None
    ) -> None:
        self.rank, self.size, self.process = rank, size, process
        self.attempt = 0
        """Number of the attempt, from 1 on; 0 before the first rank has begun one."""
        self.belongs = False
        """Whether this rank is one of the attempt, and not too late for one that has failed."""
        self.store = store
        """For what ranks of this attempt tell each other; usable once ``come`` has been called."""
        self.local: dict[int, Process] = {}
        """Ranks of this host, once all have come."""
        self._launch, self._alive = store, alive
        self._known: dict[int, Process] = {rank: process}

    def come(self, deadline: float, waiting: Callable[[float], None], **told: str) -> bool:
        """Join the newest attempt, and wait for the other ranks of it.

        Args:
            deadline: of ``time.monotonic()``, until which to wait.
            waiting: called every few seconds with the seconds that are left.
            told: what to ``tell`` before.

        Returns:
            Whether all have come in that time.

        Raises:
            torch.distributed.DistError: if the store has gone.
        """
        if self.rank == 0:
            self._join(self._launch.add("attempt", 1), told)
        while (left := deadline - time.monotonic()) > 0:
            # Only the first rank may say that all are there: of an attempt that has failed it is gone.
            wanted = "complete" if self.rank == 0 else "met"
            place, key = (
                (self.store, wanted) if self.belongs else (self._launch, "never" if self.attempt else "attempt")
            )
            if self._wait(place, [key], min(left, POLL_SECONDS)) and self.belongs:
                self._meet()
                return True
            newest = int(self._launch.get("attempt")) if self._launch.check(["attempt"]) else 0
            if newest != self.attempt:
                self._join(newest, told)
            elif self.belongs and self.store.check(["lost"]):
                return False
            waiting(deadline - time.monotonic())
        return False

    def tell(self, what: str, value: str) -> None:
        """Tell something of this rank."""
        self.store.set(f"{what}/{self.rank}", value)

    def told(self, what: str) -> list[str]:
        """What every rank has told, in one message; waits for those that have not."""
        return [value.decode() for value in self.store.multi_get([f"{what}/{rank}" for rank in range(self.size)])]

    def decided(self, what: str, mine: str, decide: Callable[[list[str]], str], seconds: float) -> str:
        """What the first rank decides by what all have told; all ranks take part.

        Raises:
            torch.distributed.DistError: if a rank does not take part.
        """
        deadline = time.monotonic() + seconds
        self.tell(what, mine)
        if self.rank == 0:
            self._wait_until([f"{what}/{rank}" for rank in range(self.size)], deadline)
            self.store.set(what, decide(self.told(what)))
        self._wait_until([what], deadline)
        verdict = self.store.get(what).decode()
        if self.store.add(f"{what} read", 1) == self.size:
            self.store.set(f"{what} read by all", "")
        if self.rank == 0:  # which takes the store with it when it ends
            self._wait_until([f"{what} read by all"], deadline)
        return verdict

    def missing(self) -> str:
        """Ranks that have not come with the hosts where they should be, as text; empty where all have."""
        lacking = self._absent(range(self.size))
        there = sorted(set(range(self.size)) - lacking)
        lines = self.store.multi_get([f"process/{rank}" for rank in there])
        hosts = expected_hosts({rank: process["host"] for rank, process in map(json.loads, lines)})
        absent: dict[str, list[str]] = {}
        for rank in sorted(lacking):
            absent.setdefault(hosts.get(rank, "not known"), []).append(str(rank))
        return "; ".join(f"rank {', '.join(ranks)} of {self.size} (host {host})" for host, ranks in absent.items())

    def _absent(self, ranks: range) -> set[int]:
        """Those that have not come, by halves: a few messages for each."""
        if self.store.check([f"process/{rank}" for rank in ranks]):
            return set()
        if len(ranks) == 1:
            return {ranks[0]}
        middle = len(ranks) // 2
        return self._absent(ranks[:middle]) | self._absent(ranks[middle:])

    def name(self, rank: int) -> str:
        """A rank with its host, as text."""
        host = "that is not known"
        with suppress(dist.DistError):
            host = self._process(rank).host
        return f"rank {rank} of {self.size} on host {host}"

    def _wait(self, store: dist.Store, keys: list[str], seconds: float) -> bool:
        """Whether keys are there within some seconds."""
        try:
            store.wait(keys, timedelta(seconds=seconds))
        except dist.DistStoreError:  # so it says that time is over
            return False
        finally:
            self._alive()
        return True

    def _wait_until(self, keys: list[str], deadline: float) -> None:
        while not self._wait(self.store, keys, POLL_SECONDS):
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"{keys[0]} was not told in time")

    def _join(self, attempt: int, told: dict[str, str]) -> None:
        # With the size: ranks of an attempt with others may still come, or come to it too late.
        self.attempt, self.store = attempt, dist.PrefixStore(f"attempt {attempt} of {self.size}", self._launch)
        self.belongs = not self.store.check(["lost"])
        line = json.dumps([self.rank, asdict(self.process)]) + "\n"
        told = {**told, "process": line}
        keys = [f"{what}/{self.rank}" for what in told]
        self.store.multi_set(keys, list(told.values()))  # type: ignore[attr-defined]  # the stubs lack it
        self.store.append(f"host/{self.process.host}", line)  # type: ignore[attr-defined]
        number = self.store.add("came", 1)
        self.belongs = self.belongs and number <= self.size
        if number == self.size:
            self.store.set("complete", "")

    def _meet(self) -> None:
        if self.rank == 0:
            self.store.set("met", "")
        lines = self.store.get(f"host/{self.process.host}").decode().splitlines()
        self.local = {rank: Process(**process) for rank, process in map(json.loads, lines)}
        self._known |= self.local
        self._process(0)

    def _process(self, rank: int) -> Process:
        if rank not in self._known:
            self._known[rank] = Process(**json.loads(self.store.get(f"process/{rank}"))[1])
        return self._known[rank]
