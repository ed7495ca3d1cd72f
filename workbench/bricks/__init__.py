"""Bricks: adapters and checkpoints with their cards, local or on the Hugging Face Hub."""
