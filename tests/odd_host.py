"""A rank that pretends to be a host of its own, of which one may have a defect.

torchrun ... tests/odd_host.py DEFECT RANK PROGRAM [OPTIONS]
"""

import os
import resource
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

THROTTLE = """
import os, psutil, signal, time
parent = os.getppid()
while psutil.Process(parent).cpu_times().user < 2:  # while it loads its libraries
    time.sleep(0.1)
while os.getppid() == parent:
    os.kill(parent, signal.SIGSTOP)
    time.sleep(0.07)
    os.kill(parent, signal.SIGCONT)
    time.sleep(0.03)
"""
"""As a quota of a cgroup does: the process runs for a third of the time."""


def plant(defect: str) -> None:
    """Let this host have something wrong."""
    if defect == "card":
        os.environ["GLOO_SOCKET_IFNAME"] = "eth9"
    elif defect == "folder":
        Path("elsewhere").mkdir(exist_ok=True)
        os.chdir("elsewhere")  # a relative path is another folder here
    elif defect == "clock":
        now = time.time
        time.time = lambda: now() + 7200
    elif defect == "descriptors":
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    elif defect == "slow":
        subprocess.Popen([sys.executable, "-c", THROTTLE])
    elif defect == "breaks":
        import torch

        from ecp_scale.doctor import examination

        def break_down(device: torch.device) -> list[Any]:
            raise torch.OutOfMemoryError("no memory")

        examination.arithmetic = break_down
    else:
        assert defect == "none", defect


if __name__ == "__main__":
    _, defect, at, program, *options = sys.argv
    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    socket.gethostname = lambda: f"host{rank}"
    sys.argv = [program, *options]
    if rank == at:
        plant(defect)
    runpy.run_path(program, run_name="__main__")
