"""The mixing kernel, and live models whose bricks are chosen for each prompt."""
