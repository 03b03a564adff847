"""Compare the files of checkpoints with the hashes that were taken when they were written."""

import sys

from ecp_scale.commands.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
