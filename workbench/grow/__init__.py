"""Grow: new parameters from old ones. One method a file; `remap.py` and `preserve.py` are shared."""
