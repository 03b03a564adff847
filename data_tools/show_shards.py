"""Show what token shards hold: tokenizer, sources, sizes, and a decoded document."""

import sys

from ecp_scale.commands.show_shards import main

if __name__ == "__main__":
    sys.exit(main())
