"""Transformers models: layouts, names, live models, tokens."""
