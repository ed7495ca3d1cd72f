"""Memories: what acts on a live model beside its weights."""
