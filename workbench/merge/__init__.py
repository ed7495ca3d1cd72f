"""Merge: bricks' deltas into one delta. One method a file; `stream.py` and `trim.py` are shared."""
