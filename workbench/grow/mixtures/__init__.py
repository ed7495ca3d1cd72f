"""Shared code for growing mixture-of-experts models."""
