"""What fuse methods share: alignment of tokens, distributions of teachers on disk, fused targets, and the loss."""
