"""Merge a checkpoint (any tensor-parallel size, ZeRO 0-3) into model.safetensors, config.json and the tokenizer."""

import argparse
import os
from pathlib import Path

from ecp_scale.errors import input_errors_exit


@input_errors_exit()
def main() -> None:
    """Read the command line and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=os.path.expanduser,
        metavar="PATH",
        help="a run folder (newest), or one checkpoint",
    )
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="DIR", help="model folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights")
    options = parser.parse_args()

    import torch

    from ecp_scale.checkpoint.export import export
    from ecp_scale.checkpoint.folder import find_checkpoint

    checkpoint = find_checkpoint(Path(options.checkpoint))
    record = export(checkpoint, Path(options.output), getattr(torch, options.dtype))
    print(
        f"{options.output}: {len(record.partitions)} tensors of step {record.step} "
        f"(tensor parallel {record.tensor_parallel}, ZeRO-{record.zero_stage}, {record.world_size} ranks)"
    )
