"""The flags by which programs are told what text to read."""

import argparse
import os

STDIN_FORMATS = (".jsonl", ".txt", ".csv")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --input, --stdin and --text-key."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        type=os.path.expanduser,
        metavar="PATH",
        help="files, folders, patterns in quotes, - (standard input), hub datasets; may be given several times",
    )
    parser.add_argument("--stdin", choices=STDIN_FORMATS, default=".jsonl", help="what - holds (default: .jsonl)")
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text, as meta.text too (default: text)"
    )
