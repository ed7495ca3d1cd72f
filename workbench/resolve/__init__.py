"""Resolving of recipes: locate the inputs, check them, and compute keys."""
