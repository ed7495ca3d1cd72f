"""PEFT adapters: read as deltas of the base's tensors, and written from low-rank updates."""

from workbench.adapters.read import CONFIG, WEIGHTS, Adapter, BoundAdapter
from workbench.adapters.write import write_adapter

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "BoundAdapter", "write_adapter"]
