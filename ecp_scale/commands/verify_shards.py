"""Check token shards against their manifest: structure, counts, ids, hashes. Exits 1 where something is wrong."""

import os
from pathlib import Path

from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser


@input_errors_exit()
def main() -> int:
    """Read the command line and print every problem."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("prefix", type=os.path.expanduser, metavar="PREFIX", help="prefix of the shards")
    parser.add_argument("--deep", action="store_true", help="also decode every document and encode it again")
    options = parser.parse_args()

    from ecp_scale.data.manifest import Manifest
    from ecp_scale.data.tokenizer import gives_texts_back
    from ecp_scale.preparation.verification import verify

    problems = 0
    for problem in verify(Path(options.prefix), options.deep):
        problems += 1
        print(problem)
    manifest = Manifest.read(Path(options.prefix))
    if options.deep and not gives_texts_back(manifest.load_tokenizer(Path(options.prefix))):
        print(
            "note: this tokenizer does not give texts back; documents were decoded, but not compared with their texts"
        )
    verdict = f"{problems} problems" if problems else "all well"
    print(f"{options.prefix}: {len(manifest.shards)} shards, {manifest.totals.tokens} tokens: {verdict}")
    return int(problems > 0)
