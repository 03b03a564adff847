"""All that knows DeepSpeed: its JSON, the engine, its files, what it keeps in memory."""
