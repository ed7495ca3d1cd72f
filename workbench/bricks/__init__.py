"""Bricks: adapters and checkpoints with their cards, on disk and on the hub."""
