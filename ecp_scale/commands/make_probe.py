"""Generate texts whose answers stand at a known distance: copy, associative recall, pass key.

    ecp-make-probe --task passkey --length 512 --distances 16,64,256 --count 20000 --output-prefix probes/train
    ecp-make-probe --task passkey --length 512 --distances 16,64,256 --count 600 --seed 2 --output-prefix probes/test

copy:     .....<kdaubqylmnez>..........=kdaubqylmnez     the letters again
recall:   ....k5s8q5t7b7l2f6z3n8o2x1p7d6w7.s8            the digit that followed the letter
passkey:  .......#4821#................?4821             the digits

Every text is one training window of LENGTH bytes, of which the answer alone has a loss. It writes PREFIX.jsonl, for
ecp-compare --task, and shards of it, for data.prefix, with bytes as tokens.
"""

import json
import os
from pathlib import Path

from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser


@input_errors_exit()
def main() -> None:
    """Read the command line, write the texts and their shards."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=("copy", "recall", "passkey"), help="what is asked")
    parser.add_argument("--length", required=True, type=int, metavar="N", help="model.sequence_length")
    parser.add_argument(
        "--distances",
        required=True,
        metavar="D,D,...",
        help="tokens between a question and what answers it: at least 13 of copy, 5 of passkey, 1 of recall",
    )
    parser.add_argument("--count", required=True, type=int, metavar="N", help="texts, over all distances in turn")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the random texts (default: 1)")
    parser.add_argument(
        "--output-prefix", required=True, type=os.path.expanduser, metavar="PREFIX", help="folder and name of the files"
    )
    options = parser.parse_args()
    words = options.distances.split(",")
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--distances is {options.distances!r}, expected numbers separated by commas")

    from ecp_scale.data.manifest import manifest_path
    from ecp_scale.preparation.parsing import Parsing
    from ecp_scale.preparation.preprocessing import preprocess
    from ecp_scale.preparation.probes import check, probes

    distances = tuple(map(int, words))
    check(options.task, options.length, distances, options.count)
    prefix = Path(options.output_prefix)
    texts = prefix.with_name(prefix.name + ".jsonl")
    for path in (texts, manifest_path(prefix)):
        if path.exists():
            raise InputError(f"{path} exists already; choose another prefix or remove its files")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with texts.open("w") as file:
            for probe in probes(options.task, options.length, distances, options.count, options.seed):
                file.write(json.dumps(probe.record) + "\n")
    except OSError as error:
        raise InputError(f"{error.filename or texts}: {error.strerror or error}") from error
    manifest = preprocess([str(texts)], "byte", str(prefix), parsing=Parsing("answer", prompt_key="prompt"))
    print(f"{prefix}: {manifest.totals.documents:,} texts of {options.length:,} tokens; {texts}, and shards of it")
