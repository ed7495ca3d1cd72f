"""Recipes: fields, validation and loading."""
