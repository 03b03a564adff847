"""Draw loss, validation loss, learning rate, gradient norm and speed of runs against tokens."""

import sys

from ecp_scale.commands.plot import main

if __name__ == "__main__":
    sys.exit(main())
