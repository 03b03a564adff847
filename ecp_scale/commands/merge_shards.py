"""Join shards that were preprocessed apart (preprocess.py --part I --parts N) into one corpus, without copying them."""

import os
from pathlib import Path

from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser


@input_errors_exit()
def main() -> None:
    """Read the command line and print what was joined."""
    parser = OptionParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="+", type=os.path.expanduser, metavar="PREFIX", help="prefixes of the parts, in order"
    )
    parser.add_argument(
        "--output-prefix", required=True, type=os.path.expanduser, metavar="PREFIX", help="prefix of the whole"
    )
    options = parser.parse_args()

    from ecp_scale.preparation.merging import merge

    manifest = merge(Path(options.output_prefix), [Path(part) for part in options.parts])
    print(f"{options.output_prefix}: {len(manifest.shards)} shards, {manifest.totals.tokens} tokens")
