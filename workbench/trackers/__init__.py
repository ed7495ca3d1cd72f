"""Scores as runs of experiment trackers."""
