"""Checkpoints: saved so that a kill never harms the older one, resumed exactly, merged and exported."""
