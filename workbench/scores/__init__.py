"""Scores on disk, and their statistics. Nothing here imports torch, lm_eval or a recipe."""
