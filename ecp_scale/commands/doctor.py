"""Say whether hosts can train together, before a job waits for it: one table, in about a minute.

    ecp-doctor --folder runs                       this host alone
    ecp-doctor --hostfile hostfile                 names, slots, addresses and ssh, from where you would launch
    deepspeed --hostfile hostfile --module ecp_scale.commands.doctor --folder /shared/runs
    srun ecp-doctor --folder /shared/runs          all hosts of a job; so does torchrun with the options of the run

Exits 1 if anything is bad. Nothing is left in the folder.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from ecp_scale.cluster.ranks import Ranks, adopt_launcher
from ecp_scale.console import quiet, say
from ecp_scale.errors import InputError, LostRankError, input_errors_exit, is_first_of_host

TIMEOUT_SECONDS = 60


@input_errors_exit()
def main() -> int:
    """Read the command line, look, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=os.path.expanduser, metavar="DIR", help="where runs are to lie, on a file system of all hosts"
    )
    parser.add_argument("--hostfile", type=os.path.expanduser, metavar="FILE", help="as deepspeed reads it")
    parser.add_argument("--no-ssh", action="store_true", help="with --hostfile: do not reach the hosts by ssh")
    parser.add_argument(
        "--timeout", type=int, default=TIMEOUT_SECONDS, metavar="S", help="to wait for ranks (default: 60)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    options = parser.parse_args()
    if options.timeout < 1:
        raise InputError(f"--timeout is {options.timeout}, expected at least 1")
    adopt_launcher()
    if options.hostfile is not None:
        if "RANK" in os.environ:
            raise InputError("--hostfile is for the host that launches, not for the ranks of a launch; leave it out")
        from ecp_scale.doctor.findings import has_bad, table
        from ecp_scale.doctor.hostfile import examine_hostfile, read_hostfile

        listed = examine_hostfile(read_hostfile(Path(options.hostfile)), not options.no_ssh)
        print(table(listed))
        return int(has_bad(listed))
    folder = None if options.folder is None else Path(options.folder)
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "log"
        try:
            with quiet(log):
                text, is_bad = examine(folder, options.timeout)
        except (InputError, LostRankError, KeyboardInterrupt):
            raise
        except Exception:
            sys.stderr.write(log.read_text(errors="replace"))
            raise
    if text:
        print(text)
    return int(is_bad)


def examine(folder: Path | None, timeout_seconds: int) -> tuple[str, bool]:
    """The table, on the first rank, and whether anything is bad; all ranks of the launch take part."""
    import torch.distributed as dist

    from ecp_scale.cluster.meeting import Meeting
    from ecp_scale.cluster.rendezvous import rendezvous
    from ecp_scale.config import ParallelConfig
    from ecp_scale.doctor.findings import Finding, Placed, has_bad, table
    from ecp_scale.doctor.host import examine_host
    from ecp_scale.doctor.together import arithmetic, clock, messages, shared_folder
    from ecp_scale.doctor.training import train_two_steps
    from ecp_scale.parallel.device import backend, gpu_identity, local_device
    from ecp_scale.parallel.groups import everyone, process_groups

    host = socket.gethostname()
    alone = [Placed(host, finding) for finding in examine_host()] if is_first_of_host() else []
    found: list[Placed] = list(alone)

    def share(meeting: Meeting) -> None:
        """What hosts say of themselves: where a card is wrong, ranks could not connect to tell it."""
        texts = meeting.decided("doctor", json.dumps(alone), lambda all_of: json.dumps(all_of), timeout_seconds)
        found.clear()
        for place, finding in (one for text in json.loads(texts) for one in json.loads(text)):
            found.append(Placed(place, Finding(*finding)))
        if has_bad(found):
            raise _UnfitError

    device = local_device(Ranks.from_environment().local_rank)
    on_gpu = device if device.type == "cuda" else None
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with (
            rendezvous(backend(device), timeout_seconds, gpu_identity(device), on_gpu, share),
            process_groups(ParallelConfig(), device=device) as groups,
        ):
            name, hosts = f"rank {dist.get_rank()} on {host}", everyone(host)
            mine: list[Any] = [Placed(host, clock())]
            if folder is not None:
                mine += [Placed(host, one) for one in shared_folder(folder)]
            mine += [Placed(name, one) for one in arithmetic(device)]
            mine += [Placed(name, one) for one in messages(device, hosts)]
            mine.append(Placed(name, train_two_steps(groups)))
            found += [one for of_rank in everyone(mine) for one in of_rank]
    except _UnfitError:
        pass
    if folder is None and is_first:
        say("note: without --folder no shared folder is looked at")
    return (table(found) if is_first else ""), has_bad(found)


class _UnfitError(Exception):
    """A host cannot take part."""
