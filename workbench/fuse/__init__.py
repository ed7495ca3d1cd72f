"""Fuse methods: how the next-token distributions of several models become one that the base learns."""
