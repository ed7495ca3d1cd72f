"""What fuse methods share: alignment of tokens, distributions of teachers on disk, and the loss."""
