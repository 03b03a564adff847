"""Train a sentencepiece tokenizer (byte-pair encoding, lossless) on any input of preprocess.py."""

import os

from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.preparation.input_arguments import add_input_arguments


@input_errors_exit()
def main() -> None:
    """Read the command line and print what was written."""
    parser = OptionParser(description=__doc__)
    add_input_arguments(parser)
    parser.add_argument(
        "--output", required=True, type=os.path.expanduser, metavar="FILE", help="the .model file to write"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, 256 bytes and specials included")
    parser.add_argument("--sample-bytes", type=int, metavar="N", help="train on N bytes of lines, drawn from all")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="training threads (default: 1)")
    options = parser.parse_args()

    from ecp_scale.data.tokenizer import load_tokenizer
    from ecp_scale.preparation.parsing import Parsing
    from ecp_scale.preparation.tokenizer_training import train_tokenizer

    used = train_tokenizer(
        options.input,
        options.output,
        options.vocab_size,
        parsing=Parsing(options.text_key, stdin=options.stdin),
        threads=options.threads,
        sample_bytes=options.sample_bytes,
        seed=options.seed,
    )
    tokenizer = load_tokenizer(f"sentencepiece:{options.output}")
    share = used.used / max(1, used.text)
    print(f"trained on {used.used:,} of {used.text:,} bytes of text ({share:.1%})")
    print(f"{options.output}: {tokenizer.vocab_size} entries, sha256 {tokenizer.sha256[:12]}...")
