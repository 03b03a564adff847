"""Say whether hosts can train together, before a job waits for it: one table, in about a minute.

    ecp-doctor --folder runs                       this host alone
    ecp-doctor --hostfile hostfile                 names, slots, addresses and ssh, from where you would launch
    deepspeed --hostfile hostfile --module ecp_scale.commands.doctor --folder /shared/runs
    srun ecp-doctor --folder /shared/runs          all hosts of a job; so does torchrun with the options of the run

Exits 1 if anything is bad. Nothing is left in the folder.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from ecp_scale.cluster.ranks import adopt_launcher
from ecp_scale.console import quiet, say, waiting
from ecp_scale.errors import InputError, input_errors_exit, is_first_rank
from ecp_scale.option_parser import OptionParser

TIMEOUT_SECONDS, LEAST_TIMEOUT = 60, 20


@input_errors_exit()
def main() -> int:
    """Read the command line, look, and print the table."""
    parser = OptionParser(description=__doc__)
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
    if options.timeout < LEAST_TIMEOUT:
        raise InputError(f"--timeout is {options.timeout}, expected at least {LEAST_TIMEOUT}")
    adopt_launcher()
    if options.hostfile is not None:
        if options.folder is not None or "RANK" in os.environ:
            raise InputError(
                "--hostfile looks from the host that launches, without --folder and before ranks are started"
            )
        return _look_at_hostfile(Path(options.hostfile), not options.no_ssh)
    if options.folder == "":
        raise InputError("--folder is empty, expected a folder that all hosts see")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    folder = None if options.folder is None else Path(options.folder)
    if folder is None and is_first_rank():
        say("note: without --folder no shared folder is looked at")
    stdout = os.dup(1)
    with tempfile.TemporaryDirectory() as logs, quiet(Path(logs) / "log"):
        return _examine(folder, options.timeout, stdout)


def _examine(folder: Path | None, timeout_seconds: int, stdout: int) -> int:
    with waiting("loading libraries", is_first_rank()):
        from ecp_scale.doctor.examination import Examination
        from ecp_scale.doctor.findings import has_bad, table

    examination = Examination(folder, timeout_seconds)

    def show() -> None:
        if is_first_rank():
            os.write(stdout, (table(examination.found) + "\n").encode())

    examination.examine(show)
    show()
    return int(has_bad(examination.found))


def _look_at_hostfile(path: Path, uses_ssh: bool) -> int:
    from ecp_scale.doctor.findings import has_bad, table
    from ecp_scale.doctor.hostfile import examine_hostfile, read_hostfile

    found = examine_hostfile(read_hostfile(path), uses_ssh)
    print(table(found))
    return int(has_bad(found))


if __name__ == "__main__":
    sys.exit(main())
