"""Continue a prompt with an exported model."""

import sys

from ecp_scale.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
