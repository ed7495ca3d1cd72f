"""Models that turn texts into vectors, in the layout of sentence-transformers."""
