"""Merge methods, which combine the deltas of several bricks into one. Each file is one method; folders hold shared code."""
