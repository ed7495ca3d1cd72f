"""Search over fields of a recipe.

Candidates are built and scored in memory and recorded in a study that can be resumed. The best ones are tested on items that the search did
not use.
"""
