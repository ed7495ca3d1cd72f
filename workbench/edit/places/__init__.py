"""Layers, token positions and forward passes that edits use."""
