"""Memories that act on a live model without a change of its weights."""
