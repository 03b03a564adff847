#!/usr/bin/env python3
"""Stands for pdsh and ssh between pretended hosts: runs a command in the namespaces of the hosts that are named.

The runner of ``deepspeed --hostfile`` calls pdsh as ``pdsh -S -f 1024 -w host1,host2 COMMAND``, with %n for the number
of the host.
"""

import os
import signal
import subprocess
import sys

SPACES = dict(pair.split("=") for pair in os.environ["ECP_PRETENDED_HOSTS"].split(","))
"""Namespace by host."""


def start(host: str, command: str) -> "subprocess.Popen[bytes]":
    """Run a command of a shell on a host."""
    inside = f"hostname {host}; {command}"
    return subprocess.Popen(["ip", "netns", "exec", SPACES[host], "unshare", "--uts", "sh", "-c", inside])


if __name__ == "__main__":
    words = sys.argv[1:]
    hosts = words[words.index("-w") + 1].split(",")
    command = " ".join(words[words.index("-w") + 2 :])
    started = [start(host, command.replace("%n", str(number))) for number, host in enumerate(hosts)]
    signal.signal(signal.SIGTERM, lambda *_: [one.terminate() for one in started] and None)
    sys.exit(max(abs(one.wait()) for one in started))
