"""Show what token shards hold: tokenizer, sources, sizes, and a decoded document."""

import os
from pathlib import Path

from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser

SHOWN = 5
"""Sources, bad records and files that were not read, of which so many are named."""


@input_errors_exit()
def main() -> None:
    """Read the command line and print."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("prefix", type=os.path.expanduser, metavar="PREFIX", help="prefix of the shards")
    parser.add_argument("--shard", type=int, default=0, metavar="N", help="shard of the document (default: 0)")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="document of the shard (default: 0)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to show of it (default: 200)")
    options = parser.parse_args()

    import numpy as np

    from ecp_scale.data.manifest import Manifest, unread_lines
    from ecp_scale.data.marks import plain
    from ecp_scale.data.shards import TokenShard

    prefix = Path(options.prefix)
    manifest = Manifest.read(prefix)
    counts, tokenizer = manifest.totals, manifest.tokenizer
    print(f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size} entries, sha256 {tokenizer.sha256[:12]}...")
    print(f"documents    {counts.documents:,} in {len(manifest.shards)} shards")
    print(f"tokens       {counts.tokens:,}, {counts.tokens / max(1, counts.words):.2f} per word")
    print(f"text         {counts.bytes:,} bytes, {counts.words:,} words")
    if manifest.marked:
        shards = [TokenShard(prefix.parent / shard.name) for shard in manifest.shards]
        trained = sum(int((shard.ids >= 0).sum()) for shard in shards)
        print(f"with a loss  {trained:,} tokens; the others are marked")
    print(f"left out     {manifest.skipped}")
    for reason in manifest.skipped.named[:SHOWN]:
        print(f"  {reason}")
    print(f"unknown      {counts.unknown:,} tokens, {counts.unknown_share:.3%} of all")
    for source in manifest.sources[:SHOWN]:
        print(f"source       {source.name} ({source.bytes:,} bytes)")
    if len(manifest.sources) > SHOWN:
        print(f"             and {len(manifest.sources) - SHOWN:,} more")
    for line in unread_lines(manifest.unread):
        print(f"not read     {line}")
    if not 0 <= options.shard < len(manifest.shards):
        raise InputError(f"--shard is {options.shard}, expected 0 to {len(manifest.shards) - 1}")
    record = manifest.shards[options.shard]
    shard = TokenShard(prefix.parent / record.name)
    quartiles = np.percentile(shard.lengths, (0, 25, 50, 75, 100)).astype(int)
    print(f"\n{record.name}: {shard.dtype}, lengths of documents (quartiles) {', '.join(map(str, quartiles))}")
    if not 0 <= options.document < len(shard.lengths):
        raise InputError(f"--document is {options.document}, expected 0 to {len(shard.lengths) - 1}")
    ids = plain(shard.document(options.document))
    print(f"document {options.document}: {len(ids)} tokens, beginning with {ids[:12].tolist()}\n")
    print(manifest.load_tokenizer(prefix).decode(ids[: options.tokens].tolist()))
