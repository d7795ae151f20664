"""Checkpoints: references, layouts, lazy reading, streamed writing."""
