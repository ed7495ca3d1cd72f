"""Bricks and the installation: training, extraction, rebasing, comparison of recipes, the starter base, the doctor."""
