"""Perplexity in three units, and generation."""
