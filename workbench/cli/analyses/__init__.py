"""The commands of `analyze`, one module each."""
