"""All that knows DeepSpeed: its JSON, the engine, its files, what it keeps in memory."""

import logging

# It would warn of a missing GPU before the first line of every program, also where nobody expects one.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
