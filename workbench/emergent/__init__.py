"""Emergent bricks: groups of a model's own neurons, found by what activates them and proved by switching them off.

Source: Xiao et al. 2024, Configurable Foundation Models, arXiv 2409.02877, section 4.
"""
