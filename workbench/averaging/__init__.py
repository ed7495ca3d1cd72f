"""Training runs as bricks."""
