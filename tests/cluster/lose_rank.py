"""Run by test_heartbeat.py as one rank of a launch. Arguments: timeout in seconds, rank that is lost, how.

Every rank prints "together" once all have met, then works in collectives until it is stopped.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

from ecp_scale.cluster.heartbeat import rendezvous
from ecp_scale.errors import input_errors_exit


def fail(how: str) -> None:
    """End this rank, or stop it where it stands."""
    if how == "raises":
        raise ValueError("out of ideas\nand of more")
    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


def main() -> None:
    """Join, work, and be lost or find out who is."""
    timeout, lost, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with rendezvous("gloo", timeout):
        dist.all_reduce(torch.ones(1))
        print("together", flush=True)
        for _ in range(2000 if how != "nothing" else 20):
            if dist.get_rank() == lost:
                fail(how)
            if how == "mistaken":
                torch.ones(2) + torch.ones(3)
            dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    with input_errors_exit():
        main()
