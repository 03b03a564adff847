"""Print how well an exported model predicts a text."""

import sys

from ecp_scale.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
