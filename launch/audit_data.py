"""Say up to which step a run has read what its config says: recompute the data digest of its metrics."""

import sys

from ecp_scale.commands.audit import main

if __name__ == "__main__":
    sys.exit(main())
