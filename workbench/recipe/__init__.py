"""Recipes: what users write, validated."""
