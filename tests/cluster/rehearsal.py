"""What becomes of a launch on pretended hosts when something fails: python -m tests.cluster.rehearsal [NAME ...].

Every failure strikes a launch of two hosts with two ranks each, in the middle of training. The table says after how
many seconds all ranks had stopped, what they said, and how many steps were lost. Needs root and iproute2.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ecp_scale.planning.rehearsal import write_text_of_package
from ecp_scale.preparation.preprocessing import preprocess
from tests.cluster.nodes import Node, nodes, why_not
from tests.launching import metrics

SCRIPT = "launch/pretrain_ecp.py"
TIMEOUT_SECONDS = 40
"""``parallel.timeout_seconds``, within half of which a rank without a heartbeat is taken for lost."""
STEPS, EVERY = 400, 5
"""Of the run, and between two checkpoints."""
STRUCK_AT = 12
LONGEST_SECONDS = 180


def script(prefix: str, run: Path, steps: int = STEPS, batch: int = 12) -> list[object]:
    """A small run, which any number of ranks can do that divides its batch."""
    values: dict[str, object] = {
        "data.prefix": prefix,
        "training.output_dir": run,
        "training.steps": steps,
        "training.micro_batch_size": 1,
        "training.global_batch_size": batch,
        "training.precision": "fp32",
        "model.layers": 2,
        "model.width": 32,
        "model.heads": 2,
        "model.key_value_heads": 1,
        "model.feed_forward_width": 64,
        "model.sequence_length": 64,
        "model.segment_length": 32,
        "optimizer.schedule": "constant",  # the same for runs of any length
        "optimizer.warmup_tokens": 2000,
        "checkpoint.every_steps": EVERY,
        "parallel.timeout_seconds": TIMEOUT_SECONDS,
    }
    return [SCRIPT, "--config", "demo", "--resume=auto", *(f"--{key}={value}" for key, value in values.items())]


@dataclass
class Launch:
    """A launch on all hosts, as it goes."""

    hosts: list[Node]
    folder: Path
    prefix: str
    nnodes: str = "2"
    restarts: int = 0
    endpoint: int = 0
    """Number of the host where they meet."""
    agents: list[Any] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.folder / "run"

    def log(self, host: Node) -> Path:
        """What a host says."""
        return self.folder / f"{host.name}.log"

    def start(self, ranks: int = 2, steps: int = STEPS, batch: int = 12) -> None:
        """Start ranks on all hosts."""
        words = script(self.prefix, self.run, steps, batch)
        for host in self.hosts:
            self.agents.append(host.torchrun(self.nnodes, ranks, self.restarts, words, self.log(host), self.endpoint))

    def start_by_deepspeed(self, ranks: int, steps: int) -> "subprocess.Popen[bytes]":
        """Start ranks on all hosts by ``deepspeed --hostfile`` on the first one, over what stands for pdsh and ssh."""
        tools = self.folder / "tools"
        tools.mkdir(exist_ok=True)
        for name, content in (("pdsh", Path(__file__).with_name("pdsh.py").read_text()), ("ssh", "#!/bin/sh\n")):
            (tools / name).write_text(content)
            (tools / name).chmod(0o755)
        hostfile = self.folder / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots={ranks}\n" for host in self.hosts))
        spaces = ",".join(f"{host.name}={host.space}" for host in self.hosts)
        words: list[object] = [Path(sys.executable).with_name("deepspeed"), "--hostfile", hostfile]
        words += ["--master_addr", self.hosts[0].address, *script(self.prefix, self.run, steps)]
        path = f"{tools}:{os.environ['PATH']}"
        return self.hosts[0].start(words, self.log(self.hosts[0]), PATH=path, ECP_PRETENDED_HOSTS=spaces)

    def steps_done(self) -> int:
        """Of the run."""
        return len(metrics(self.run)) if (self.run / "metrics.jsonl").exists() else 0

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        found = [int(path.name.partition("-")[2]) for path in (self.run / "checkpoints").glob("step-????????")]
        return max(found, default=0)

    def wait_until(self, reached: Callable[[], bool], seconds: float = LONGEST_SECONDS) -> float:
        """Seconds until something is so.

        Raises:
            AssertionError: with the end of what the hosts said, if it takes too long.
        """
        began = time.monotonic()
        while not reached():
            if time.monotonic() - began > seconds:
                raise AssertionError("\n".join(self.log(host).read_text()[-3000:] for host in self.hosts))
            time.sleep(0.2)
        return time.monotonic() - began

    def ranks(self) -> Iterator[psutil.Process]:
        """Processes of ranks that run."""
        for host in self.hosts:
            for process in host.processes():
                with suppress(psutil.NoSuchProcess):
                    if "RANK" in process.environ() and "pretrain_ecp.py" in " ".join(process.cmdline()):
                        yield process

    def rank(self, number: int) -> psutil.Process:
        """One rank."""
        return next(process for process in self.ranks() if process.environ()["RANK"] == str(number))

    def have_stopped(self) -> bool:
        """Whether no rank runs any more."""
        return not any(True for _ in self.ranks())

    def said(self) -> list[str]:
        """Who was lost, and why, in the words of the hosts."""
        lines = [line for host in self.hosts for line in self.log(host).read_text().splitlines()]
        kept = [line for line in lines if re.match(r"stopped|error|waiting", line)]
        return list(dict.fromkeys(re.sub(r"process \d+", "process N", line) for line in kept))


def cut(seconds: float | None) -> Callable[[Launch], None]:
    """Pull the cable of the last host, for so many seconds or for good."""

    def strike(launch: Launch) -> None:
        launch.hosts[-1].cut()
        if seconds is not None:
            time.sleep(seconds)
            launch.hosts[-1].mend()

    return strike


def come_and_go(launch: Launch) -> None:
    """Pull the cable of the last host for a second, five times."""
    for _ in range(5):
        cut(1)(launch)
        time.sleep(1)


FAILURES: dict[str, Callable[[Launch], None]] = {
    "a rank is killed": lambda launch: launch.rank(3).kill(),
    "the first rank is killed": lambda launch: launch.rank(0).kill(),
    "a host loses its power": lambda launch: launch.hosts[1].kill(),
    "the first host loses its power": lambda launch: launch.hosts[0].kill(),
    "a link is cut for good": cut(None),
    "a link is cut for 60 s": cut(60),
}
"""After which the ranks must stop."""
DISTURBANCES: dict[str, Callable[[Launch], None]] = {
    "a launcher is killed": lambda launch: launch.agents[1].kill(),
    "a link is cut for 5 s": cut(5),
    "a link comes and goes": come_and_go,
    "a link takes 100 ms": lambda launch: launch.hosts[1].slow_down("delay", "100ms"),
    "a link loses 5 % of its packets": lambda launch: launch.hosts[1].slow_down("loss", "5%"),
}
"""With which the launch must go on."""


def strike(launch: Launch, failure: Callable[[Launch], None]) -> tuple[float, int]:
    """Let something fail in mid training; seconds until all ranks had stopped, and steps since the last checkpoint."""
    launch.start()
    launch.wait_until(lambda: launch.steps_done() >= STRUCK_AT)
    began = time.monotonic()
    failure(launch)
    launch.wait_until(launch.have_stopped)
    return time.monotonic() - began, launch.steps_done() - launch.saved()


def disturb(launch: Launch, disturbance: Callable[[Launch], None]) -> float:
    """Let something disturb the training; seconds of the ten steps after that."""
    launch.start()
    launch.wait_until(lambda: launch.steps_done() >= STRUCK_AT)
    began, before = time.monotonic(), launch.steps_done()
    disturbance(launch)
    launch.wait_until(lambda: launch.steps_done() >= before + 10)
    assert not launch.said(), launch.said()
    return time.monotonic() - began


def main() -> None:
    """Rehearse, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join([*FAILURES, *DISTURBANCES]).replace("%", "%%")  # which argparse takes for its own
    parser.add_argument("names", nargs="*", help=f"some of: {names}")
    parser.add_argument("--output", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preprocess([str(write_text_of_package(folder))], "byte", str(folder / "shards"))
        for what in options.names or [*FAILURES, *DISTURBANCES]:
            place = folder / what.replace(" ", "-").replace("%", "percent")
            place.mkdir()
            with nodes(2) as hosts:
                launch = Launch(hosts, place, str(folder / "shards"))
                try:
                    if what in FAILURES:
                        seconds, lost = strike(launch, FAILURES[what])
                    else:
                        seconds, lost = disturb(launch, DISTURBANCES[what]), 0
                    said = "; ".join(launch.said()) or "goes on"
                except NotImplementedError as error:
                    print(f"{what}: not on this machine: {error}", flush=True)
                    continue
                except AssertionError:
                    seconds, lost, said = float(LONGEST_SECONDS), -1, "NOT WITHIN TIME: " + "; ".join(launch.said())
            rows.append({"what": what, "seconds": round(seconds, 1), "steps_lost": lost, "said": said})
            print(f"| {what} | {seconds:.0f} | {lost} | {said} |", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
