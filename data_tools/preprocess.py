"""Tokenize text into Megatron shards PREFIX-*.bin/.idx and PREFIX.manifest.json."""

import sys

from ecp_scale.commands.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
