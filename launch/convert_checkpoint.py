"""Merge a checkpoint (any tensor-parallel size, ZeRO 0-3) into model.safetensors, config.json and the tokenizer."""

import sys

from ecp_scale.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
