"""Where an edit reads and writes: layers, positions, forward passes."""
