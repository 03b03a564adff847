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
"""Between two looks for a newer attempt, by a rank that waits. torch warns of every wait that ends so."""


class Meeting:
    """The ranks of the newest attempt of a launch.

    Args:
        store: of the launch.
        rank: of this process.
        size: how many ranks there are.
        process: where this rank runs.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, process: Process) -> None:
        self.rank, self.size, self.process = rank, size, process
        self.attempt = 0
        """Number of the attempt, from 1 on."""
        self.store = store
        """For what ranks of this attempt tell each other; usable once ``come`` has been called."""
        self.local: dict[int, Process] = {rank: process}
        """Ranks of this host, once all have come."""
        self._launch = store
        self._known: dict[int, Process] = {rank: process}

    def come(self, seconds: float, waiting: Callable[[float], None], **told: str) -> bool:
        """Join the newest attempt, and wait for the other ranks of it.

        Args:
            seconds: how long to wait.
            waiting: called every few seconds with the seconds that are left.
            told: what to ``tell`` before.

        Returns:
            Whether all have come in that time.

        Raises:
            torch.distributed.DistError: if the store does not answer, or the first rank does not come.
        """
        deadline = time.monotonic() + seconds
        # Without the first rank its number is waited for as long as the store's own timeout says.
        newest = self._launch.add("attempt", 1) if self.rank == 0 else self._newest()
        belongs = self._join(newest, told)
        while (left := deadline - time.monotonic()) > 0:
            with suppress(dist.DistStoreError):  # so it says that time is over
                # Only the first rank may say that all are there: of an attempt that has failed it is gone.
                wanted = ("complete" if self.rank == 0 else "met") if belongs else "never"
                self.store.wait([wanted], timedelta(seconds=min(left, POLL_SECONDS)))
                if self.rank == 0:
                    self.store.set("met", "")
                self._meet()
                return True
            if self._newest() != self.attempt:
                belongs = self._join(self._newest(), told)
            waiting(left)
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
        self.tell(what, mine)
        wait = timedelta(seconds=seconds)
        if self.rank == 0:
            self.store.wait([f"{what}/{rank}" for rank in range(self.size)], wait)
            self.store.set(what, decide(self.told(what)))
        self.store.wait([what], wait)
        verdict = self.store.get(what).decode()
        if self.store.add(f"{what} read", 1) == self.size:
            self.store.set(f"{what} read by all", "")
        if self.rank == 0:  # which takes the store with it when it ends
            self.store.wait([f"{what} read by all"], wait)
        return verdict

    def missing(self) -> str:
        """Ranks that have not come with the hosts where they should be, as text."""
        there = [rank for rank in range(self.size) if self.store.check([f"process/{rank}"])]
        hosts = expected_hosts({rank: self._process(rank).host for rank in there})
        absent: dict[str, list[str]] = {}
        for rank in sorted(set(range(self.size)) - set(there)):
            absent.setdefault(hosts.get(rank, "not known"), []).append(str(rank))
        return "; ".join(f"rank {', '.join(ranks)} of {self.size} (host {host})" for host, ranks in absent.items())

    def name(self, rank: int) -> str:
        """A rank with its host, as text."""
        host = "that is not known"
        with suppress(dist.DistError):
            host = self._process(rank).host
        return f"rank {rank} of {self.size} on host {host}"

    def _newest(self) -> int:
        return int(self._launch.get("attempt"))

    def _join(self, attempt: int, told: dict[str, str]) -> bool:
        """Whether this rank belongs to an attempt: one more than all comes too late for one that has failed."""
        self.attempt, self.store = attempt, dist.PrefixStore(f"attempt {attempt}", self._launch)
        line = json.dumps([self.rank, asdict(self.process)]) + "\n"
        told = {**told, "process": line}
        keys = [f"{what}/{self.rank}" for what in told]
        self.store.multi_set(keys, list(told.values()))  # type: ignore[attr-defined]  # the stubs lack it
        self.store.append(f"host/{self.process.host}", line)  # type: ignore[attr-defined]  # the stubs lack it
        number = self.store.add("came", 1)
        if number == self.size:
            self.store.set("complete", "")
        return bool(number <= self.size)

    def _meet(self) -> None:
        lines = self.store.get(f"host/{self.process.host}").decode().splitlines()
        self.local = {rank: Process(**process) for rank, process in map(json.loads, lines)}
        self._known |= self.local
        self._process(0)

    def _process(self, rank: int) -> Process:
        if rank not in self._known:
            self._known[rank] = Process(**json.loads(self.store.get(f"process/{rank}"))[1])
        return self._known[rank]
