"""Adapters carried to other models: layers of other depth, units of other width, new releases of a base."""
