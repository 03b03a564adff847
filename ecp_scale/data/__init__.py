"""Text to token shards, and from shards to batches in an order that is pure arithmetic."""
