"""Hosts of a pretended cluster: network namespaces on one bridge, each with an address and a name of its own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launching import ROOT, environment

SESSION = os.getpid() % 100_000
"""Tells the hosts of one test session from those of another on this machine; names of cards have 15 characters."""
BRIDGE = f"ecpb{SESSION}"
PORT = 29_400


def why_not() -> str | None:
    """Why this machine can pretend no hosts; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} of iproute2 and util-linux is not installed"
    tried = subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], capture_output=True, text=True)
    if tried.returncode and "File exists" not in tried.stderr:
        return f"no bridge can be made: {tried.stderr.strip()}"
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)
    return None


def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


@dataclass(frozen=True)
class Node:
    """A pretended host."""

    number: int

    @property
    def name(self) -> str:
        """What the host calls itself."""
        return f"ecp-node{self.number}"

    @property
    def space(self) -> str:
        """Its network namespace."""
        return f"ecp-node{self.number}-{SESSION}"

    @property
    def address(self) -> str:
        """On the bridge."""
        return f"10.77.0.{self.number + 1}"

    @property
    def cable(self) -> str:
        """The bridge's end of its link."""
        return f"ecpc{SESSION}-{self.number}"

    def start(self, words: Sequence[object], log: Path, **variables: str) -> "subprocess.Popen[bytes]":
        """Start a command there."""
        inside = f'hostname {self.name}; exec "$@"'
        outer = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", inside, "sh"]
        network = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        with log.open("ab") as file:
            return subprocess.Popen(
                [*outer, *map(str, words)], env=environment() | network | variables, stdout=file, stderr=file
            )

    def torchrun(
        self, nnodes: str, nproc: int, restarts: int, script: Sequence[object], log: Path, endpoint: int = 0
    ) -> "subprocess.Popen[bytes]":
        """Start this node's part of a launch, which meets at the node with the number ``endpoint``."""
        words: list[object] = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nnodes]
        words += ["--nproc-per-node", nproc, "--max-restarts", restarts, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        words += ["--rdzv-endpoint", f"{Node(endpoint).address}:{PORT}", "--local-addr", self.address]
        words += ["--rdzv-conf", "join_timeout=120,last_call_timeout=3,is_host=" + str(int(self.number == endpoint))]
        # Else a host that joins waits for an address that is told at the first start alone.
        return self.start([*words, ROOT / script[0], *script[1:]], log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def processes(self) -> list[psutil.Process]:
        """What runs there."""
        pids = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True).stdout.split()
        found = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def kill(self) -> None:
        """End all that runs there at once, as when the host loses its power."""
        self.cut()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self.cable, "up")

    def slow_down(self, *how: object) -> None:
        """Let its link delay or lose packets, in the words of ``tc netem``.

        Raises:
            NotImplementedError: where this kernel cannot.
        """
        words = ["tc", "qdisc", "add", "dev", self.cable, "root", "netem", *map(str, how)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise NotImplementedError(f"tc netem: {done.stderr.strip()}")


@contextmanager
def nodes(count: int) -> Iterator[list[Node]]:
    """Hosts that see each other, and nothing else."""
    found = [Node(number) for number in range(count)]
    _remove(found)
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        for node in found:
            _ip("netns", "add", node.space)
            _ip("link", "add", node.cable, "type", "veth", "peer", "name", "eth0", "netns", node.space)
            _ip("link", "set", node.cable, "master", BRIDGE, "up")
            for words in (
                ("addr", "add", f"{node.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", node.space, *words)
        yield found
    finally:
        for node in found:
            for process in node.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        _remove(found)


def _remove(found: list[Node]) -> None:
    for node in found:
        subprocess.run(["ip", "link", "delete", node.cable], capture_output=True)
        subprocess.run(["ip", "netns", "delete", node.space], capture_output=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)
