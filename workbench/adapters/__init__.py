"""PEFT adapters: reading them as deltas of the base's tensors, and writing them from low-rank updates."""
