"""Shared code for growth: plans of new tensors, the weights that a plan describes, and checks of the result."""
