"""Plan a launch before it runs: memory, messages and time of every rank. Allocates nothing and needs no GPU."""

import sys

from ecp_scale.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
