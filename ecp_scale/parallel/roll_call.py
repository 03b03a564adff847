"""Who has come to a launch, and who is still there: a rank that is missing is named, with its host.

Ranks tell each other through the key-value store that the launch has anyway, never through a collective, which would
wait for the missing one. A thread of every rank gives a sign of life each second and looks for bad news, so a rank that
waits in a collective for ever (or in a kernel of NCCL, which raises nothing) stops too.
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

from ecp_scale.console import say
from ecp_scale.errors import InputError, LostRankError
from ecp_scale.parallel.places import Process, Ranks, expected_hosts

SIGN_SECONDS = 1.0
"""Between two signs of life."""
GRACE_SECONDS = 5.0
"""How long bad news may take to come, and a rank to stop by itself after they have."""
NOTICE_SECONDS = 5.0
"""After which the first rank says for whom the launch waits."""


class RollCall:
    """The ranks of a launch.

    Args:
        ranks: this process's place.
        timeout_seconds: how long the launch waits for a rank to come. One that gives no sign of life for half as long
            is taken for lost: before the collectives, which wait the whole time, give up without a name.

    Raises:
        LostRankError: if the first rank, which serves the store, does not answer in that time.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: int) -> None:
        self.ranks = ranks
        self.timeout_seconds = timeout_seconds
        self.store = self._connect()
        """For the process group."""
        # Trap: a store serves one call at a time, and those of a process group may wait in it for long.
        self._board = dist.PrefixStore("roll_call", self._connect())
        self._processes: dict[int, Process] = {}
        self._neighbours: dict[int, Process] = {}
        self._left = threading.Event()

    def gather(self) -> None:
        """Wait until all ranks have come.

        Raises:
            LostRankError: on all that have, naming those that have not.
        """
        try:
            self._processes = self._all_that_came()
        except dist.DistNetworkError as error:
            text = f"rank 0 on host {os.environ['MASTER_ADDR']} has gone before all ranks had come"
            raise LostRankError(text, speaks=self.ranks.local_rank == 0) from error
        here = self._processes[self.ranks.rank].host
        # A process that cannot be seen now runs in another container under the same name.
        self._neighbours = {
            rank: process for rank, process in self._processes.items() if process.host == here and process.is_seen()
        }

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep watch while the body runs, and after it has failed until ``leave``.

        Raises:
            LostRankError: in place of the error of a collective, if another rank is lost.
        """
        threading.Thread(target=self._keep_watch, daemon=True, name="roll call").start()
        try:
            yield
        except Exception as error:
            news = self._news_after(error)
            if news is not None:
                # The launcher has seen it too, and asks those that are left to end: they will, when they have said why.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise LostRankError(news, self._speaks()) from error
            raise
        self.leave()

    def leave(self) -> None:
        """End the watch: from now on others may go."""
        self._left.set()

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
                speaks=self.ranks.local_rank == 0 or self.ranks.rank == 1,
            ) from error

    def _all_that_came(self) -> dict[int, Process]:
        self._board.set(f"sign/{self.ranks.rank}", "0")
        self._board.set(f"came/{self.ranks.rank}", json.dumps(asdict(Process.this())))
        keys = [f"came/{rank}" for rank in range(self.ranks.world_size)]
        deadline = time.monotonic() + self.timeout_seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(dist.DistStoreError):  # so it says that time is over
                self._board.wait(keys, timedelta(seconds=min(left, NOTICE_SECONDS)))
                break
            if self.ranks.rank == 0 and left > NOTICE_SECONDS:
                waited = self.timeout_seconds - left + NOTICE_SECONDS
                say(f"after {waited:.0f} s the launch waits for {self._missing(keys)}")
        missing = self._missing(keys)
        if missing:
            text = f"{missing} did not come within parallel.timeout_seconds = {self.timeout_seconds}"
            raise LostRankError(text, self._speaks())
        return {rank: self._process(key) for rank, key in enumerate(keys)}

    def _process(self, key: str) -> Process:
        return Process(**json.loads(self._board.get(key)))

    def _missing(self, keys: list[str]) -> str:
        """Ranks that have not come with the hosts where they should be, as text."""
        came = {rank: self._process(key).host for rank, key in enumerate(keys) if self._board.check([key])}
        hosts = expected_hosts(came)
        absent: dict[str, list[str]] = {}
        for rank in range(len(keys)):
            if rank not in came:
                absent.setdefault(hosts.get(rank, "not known"), []).append(str(rank))
        return "; ".join(f"rank {', '.join(ranks)} of {len(keys)} (host {host})" for host, ranks in absent.items())

    def _speaks(self) -> bool:
        """Whether this rank tells the news on its host: the first one there that is alive."""
        alive = [rank for rank, process in self._neighbours.items() if process.is_seen()]
        return self.ranks.rank == min(alive) if alive else self.ranks.local_rank == 0

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.ranks.world_size} on host {self._processes[rank].host}"

    def _announce(self, text: str) -> str:
        """Tell all; where there are news already, those hold."""
        return self._board.compare_set("lost", "", text).decode()

    def _keep_watch(self) -> None:
        signs: dict[int, tuple[bytes, float]] = {}
        while not self._left.wait(SIGN_SECONDS):
            news = self._look(signs)
            # The body may be about to stop by itself, with a better place to say so.
            if news is not None and not self._left.wait(GRACE_SECONDS):
                if self._speaks():
                    say(f"stopped: {news}")
                os._exit(1)

    def _look(self, signs: dict[int, tuple[bytes, float]]) -> str | None:
        """Give a sign of life; return bad news, if there are any.

        ``signs`` holds the last sign of every rank and when it was new. Only the first rank reads those of all.
        """
        dead = self._dead_neighbour()
        if dead is not None:
            with suppress(dist.DistError):
                return self._announce(dead)
            return dead
        try:
            self._board.add(f"sign/{self.ranks.rank}", 1)
            if self._board.check(["lost"]):
                return self._board.get("lost").decode()
            if self.ranks.rank == 0:
                silent = self._silent(signs, self.timeout_seconds / 2)
                if silent:
                    return self._announce(silent)
        except dist.DistError:
            time.sleep(SIGN_SECONDS / 4)  # a connection ends before the process is seen to
            return self._dead_neighbour() or f"{self._name(0)} is gone: its store does not answer"
        return None

    def _dead_neighbour(self) -> str | None:
        """A rank of this host that has died, as text."""
        for rank, process in self._neighbours.items():
            if not process.is_seen():
                return f"{self._name(rank)} (process {process.pid}) has died"
        return None

    def _silent(self, signs: dict[int, tuple[bytes, float]], patience: float) -> str | None:
        """Who has given no new sign of life for ``patience`` seconds, as text."""
        now = time.monotonic()
        for rank, sign in enumerate(self._board.multi_get([f"sign/{rank}" for rank in self._processes])):
            if signs.setdefault(rank, (sign, now))[0] != sign:
                signs[rank] = (sign, now)
        lost = [rank for rank, (_, since) in signs.items() if now - since >= patience]
        return f"{'; '.join(map(self._name, lost))} gave no sign of life for {patience:.0f} s" if lost else None

    def _news_after(self, error: Exception) -> str | None:
        """Who was lost before ``error``; None where it is this rank's own, of which the others hear then."""
        # gloo raises a plain RuntimeError, NCCL one of torch's classes.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            signs: dict[int, tuple[bytes, float]] = {}
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline:
                news = self._look(signs)
                if news is None:
                    with suppress(dist.DistError):
                        silent = self._silent(signs, GRACE_SECONDS - SIGN_SECONDS)
                        news = self._announce(silent) if silent else None
                if news is not None:
                    return news
                time.sleep(SIGN_SECONDS / 2)
        with suppress(dist.DistError):
            first_line = str(error).partition("\n")[0]
            self._announce(f"{self._name(self.ranks.rank)} stopped with {type(error).__name__}: {first_line}")
        return None


@contextmanager
def joined_launch(backend: str, timeout_seconds: int) -> Iterator[None]:
    """The default process group of the launch: all ranks come, are watched, and leave together.

    Without a launcher it is a group of one on a store in memory.

    Raises:
        LostRankError: on the ranks that are there, if another does not come or is lost.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
        return
    ranks = Ranks.from_environment()
    roll_call = RollCall(ranks, timeout_seconds)
    roll_call.gather()
    try:
        with roll_call.watched():
            dist.init_process_group(
                backend, timeout=timeout, store=roll_call.store, rank=ranks.rank, world_size=ranks.world_size
            )
            yield
        dist.barrier()  # whoever goes is not missed any more
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        roll_call.leave()
