"""Say whether hosts can train together, before a job waits for it."""

import sys

from ecp_scale.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
