"""Checkpoints of other programs, read without them, as checkpoints of this project."""
