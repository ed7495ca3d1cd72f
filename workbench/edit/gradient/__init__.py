"""Shared code of edit methods that use gradient descent."""
