"""Edits by gradient descent."""
