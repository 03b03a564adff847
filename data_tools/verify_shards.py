"""Check token shards against their manifest: structure, counts, ids, hashes. Exits 1 where something is wrong."""

import sys

from ecp_scale.commands.verify_shards import main

if __name__ == "__main__":
    sys.exit(main())
