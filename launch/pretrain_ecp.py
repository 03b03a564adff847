"""Train an ECP language model."""

import sys

from ecp_scale.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
