"""Tokenize .txt and .jsonl files into Megatron shards PREFIX-*.bin/.idx and PREFIX.manifest.json."""

import argparse

from ecp_scale.data.preprocessing import preprocess
from ecp_scale.errors import input_errors_exit


def main() -> None:
    """Read the command line and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=".txt and .jsonl files, or folders")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="sentencepiece:FILE")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="folder and name of the shards")
    parser.add_argument("--text-key", default="text", help="key of the text in a .jsonl line (default: text)")
    parser.add_argument("--workers", type=int, default=1, help="tokenizing processes (default: 1)")
    parser.add_argument("--shard-tokens", type=int, default=1 << 30, help="tokens of a shard (default: 2^30)")
    options = parser.parse_args()
    manifest = preprocess(
        options.input,
        options.tokenizer,
        options.output_prefix,
        text_key=options.text_key,
        workers=options.workers,
        shard_tokens=options.shard_tokens,
        progress=True,
    )
    counts = manifest.totals
    print(
        f"{options.output_prefix}: {len(manifest.shards)} shards, {counts.documents} documents, "
        f"{counts.tokens} tokens, {counts.words} words, {counts.bytes} bytes"
    )


if __name__ == "__main__":
    with input_errors_exit():
        main()
