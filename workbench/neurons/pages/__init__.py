"""Pages of what a model's neurons do."""
