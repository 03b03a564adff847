"""Look at the checkpoints of a run: what they are, whether they are as written, how two differ, which may go.

    ecp-checkpoint list runs/first
    ecp-checkpoint verify runs/first
    ecp-checkpoint diff runs/first/checkpoints/step-00000100 runs/second
    ecp-checkpoint prune runs/first --keep-last 3 --keep-every 10000

PATH is a checkpoint, or a run. Exits 1 where a checkpoint is incomplete or damaged, or where two differ.
"""

import os
from pathlib import Path

from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser


@input_errors_exit()
def main() -> int:
    """Read the command line and do what it says."""
    parser = OptionParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {
        "list": "step, tokens, size, layout and libraries of each",
        "verify": "read every file and compare its hash",
        "prune": "remove older checkpoints of a run",
    }.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("path", metavar="PATH", type=_path, help="a run folder, or one checkpoint")
        if name == "prune":
            command.add_argument("--keep-last", type=int, required=True, metavar="N", help="newest ones that stay")
            command.add_argument("--keep-every", type=int, metavar="N", help="those stay whose step is a multiple of N")
            command.add_argument("--dry-run", action="store_true", help="say what would go")
    difference = commands.add_parser("diff", help="compare what two are, and all of their weights")
    for name in ("first", "second"):
        difference.add_argument(name, metavar="PATH", type=_path, help="a checkpoint, or a run, of which the newest")
    options = parser.parse_args()

    from ecp_scale.checkpoint import tools

    if options.command == "diff":
        return int(tools.difference(options.first, options.second, print))
    if options.command == "prune":
        if options.keep_last < 1 or (options.keep_every is not None and options.keep_every < 1):
            raise InputError("--keep-last and --keep-every: expected at least 1")
        tools.prune(options.path, options.keep_last, options.keep_every, options.dry_run, print)
        return 0
    action = tools.describe if options.command == "list" else tools.verify
    return int(not action(options.path, print))


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111, Path refuses homes of unknown users
