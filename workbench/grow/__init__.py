"""Grow: new parameters from old ones. One method a file; what they share is in folders."""
