"""PEFT adapters: read as deltas of the base's tensors, and written from low-rank updates."""
