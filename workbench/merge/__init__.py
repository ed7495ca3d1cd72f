"""Merge: bricks' deltas into one delta. One method a file; what they share is in folders."""
