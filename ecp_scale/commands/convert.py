"""Merge a checkpoint (any layout, ZeRO 0-3) into a model folder, for our programs and Hugging Face's transformers.

A conversion that was cut short goes on where it was, file by file.
"""

import os
import re
from pathlib import Path

from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser

PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "float32": "fp32", "bfloat16": "bf16"}
"""With names that earlier versions took."""


@input_errors_exit()
def main() -> None:
    """Read the command line and print what was written."""
    parser = OptionParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=os.path.expanduser,
        metavar="PATH",
        help="a run folder (newest), or one checkpoint",
    )
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="DIR", help="model folder to write")
    parser.add_argument(
        *("--precision", "--dtype"), choices=PRECISIONS, default="fp32", help="of the weights that are written"
    )
    parser.add_argument(
        "--average", action="store_true", help="the moving average of the weights (optimizer.average_decay)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="most weights in a file, such as 500MB (default: 5GB)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="files written at a time (default: 2)")
    options = parser.parse_args()
    file_bytes = _bytes(options.max_shard_size)
    if options.workers < 1:
        raise InputError(f"--workers is {options.workers}, expected at least 1")

    from ecp_scale.checkpoint.export import export
    from ecp_scale.checkpoint.folder import find_checkpoint
    from ecp_scale.checkpoint.weights_file import WriteOptions
    from ecp_scale.precision import DTYPES

    checkpoint = find_checkpoint(Path(options.checkpoint))
    how = WriteOptions(
        DTYPES[PRECISIONS[options.precision]], file_bytes, options.workers, progress=True, average=options.average
    )
    record = export(checkpoint, Path(options.output), how)
    what = "averages of tensors" if options.average else "tensors"
    print(
        f"{options.output}: {len(record.partitions)} {what} of step {record.step} "
        f"(tensor parallel {record.tensor_parallel}, ZeRO-{record.zero_stage}, {record.world_size} ranks)"
    )


def _bytes(size: str) -> int:
    """Of a size such as 5GB."""
    match = re.fullmatch(r"([1-9]\d*)(KB|MB|GB)", size)
    if match is None:
        raise InputError(f"--max-shard-size is {size!r}, expected a number with KB, MB or GB, such as 5GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]
