"""Write what is known of runs as one page of HTML."""

import sys

from ecp_scale.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
