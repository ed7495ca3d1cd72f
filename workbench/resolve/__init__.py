"""A recipe with its inputs: files, checks and keys."""
