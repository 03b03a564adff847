"""Train architectures under one data order, budget, optimizer and evaluation, and put them into one table."""

import sys

from ecp_scale.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
