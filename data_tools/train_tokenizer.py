"""Train a sentencepiece tokenizer (byte-pair encoding, lossless) on any input of preprocess.py."""

import sys

from ecp_scale.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
