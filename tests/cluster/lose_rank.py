"""Run by test_heartbeat.py as one rank of a launch. Arguments: timeout in seconds, rank that is lost, how.

Every rank prints "together" once all have met, then works in collectives until it is stopped.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from ecp_scale.cluster.progress import COMPUTES, HAS_FINISHED, WAITS, report_progress
from ecp_scale.cluster.rendezvous import rendezvous
from ecp_scale.errors import input_errors_exit


def fail(how: str) -> None:
    """End this rank, or stop it where it stands."""
    if how == "raises":
        raise ValueError("out of ideas\nand of more")
    if how == "busy":  # in a kernel that does not end: the process lives, and so does its heartbeat
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


def main() -> None:
    """Join, work, and be lost or find out who is."""
    timeout, lost, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    gpu = {"shared": "GPU-1", "own": f"GPU-{os.environ['RANK']}"}.get(how, "")
    with rendezvous("gloo", timeout, gpu):
        dist.all_reduce(torch.ones(1))
        print("together", flush=True)
        for step in range(1, 2000 if how not in ("nothing", "own") else 20):
            report_progress(step, 0, COMPUTES)
            if dist.get_rank() == lost:
                fail(how)
            if how == "mistaken":
                torch.ones(2) + torch.ones(3)
            report_progress(step, 1, WAITS)
            dist.all_reduce(torch.ones(1))
            report_progress(step, 2, HAS_FINISHED)


if __name__ == "__main__":
    with input_errors_exit():
        main()
