"""Join shards that were preprocessed apart (preprocess.py --part I --parts N) into one corpus, without copying them."""

import sys

from ecp_scale.commands.merge_shards import main

if __name__ == "__main__":
    sys.exit(main())
