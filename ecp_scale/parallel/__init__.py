"""The only room that touches Megatron's global state, DeepSpeed's mpu, CPU/GPU differences and messages."""

import logging
import os
import warnings

# Megatron-core warns at import of every optional kernel library it does not find, DeepSpeed logs its every step:
# pages of text on each rank, none of which the user can act on.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
os.environ.setdefault("DS_LOG_LEVEL", "warning")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
