"""Tensors on disk and in flight: specs, checkpoint reader and writer, low-rank deltas, digests."""
