"""Compare the files of checkpoints with the hashes that were taken when they were written.

    ecp-checkpoint verify runs/first

PATH is a checkpoint, or a run, all of whose checkpoints are read. Exits 1 where a file is damaged or missing.
"""

import argparse
import os
import time
from pathlib import Path

from ecp_scale.errors import InputError, input_errors_exit


@input_errors_exit()
def main() -> int:
    """Read the command line, and say of each checkpoint what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="read every file and compare its hash")
    verify.add_argument("path", metavar="PATH", type=os.path.expanduser, help="a run folder, or one checkpoint")
    options = parser.parse_args()

    from ecp_scale.checkpoint.folder import RECORD, CheckpointRecord, saved_folders
    from ecp_scale.zero.state_files import damages

    path = Path(options.path)
    folders = [path] if (path / RECORD).exists() else saved_folders(path)
    if not folders:
        raise InputError(f"{path}: expected a checkpoint or a run with checkpoints/step-NNNNNNNN, found none")
    wrong = 0
    for folder in folders:
        began = time.monotonic()
        try:
            record = CheckpointRecord.read(folder)
        except InputError as error:
            found = [str(error)]
        else:
            found = damages(folder, record.files)
        wrong += bool(found)
        if found:
            print("\n".join(found))
            continue
        size = sum(file.size for file in record.files.values())
        unhashed = sum(not file.xxh3 for file in record.files.values())
        older = f", {unhashed} without a hash, by an earlier version" if unhashed else ""
        seconds = time.monotonic() - began
        print(f"{folder}: {len(record.files)} files as written ({size:,} bytes in {seconds:.1f} s{older})")
    return int(wrong > 0)
