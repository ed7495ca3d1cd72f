"""Search over fields of a recipe: candidates are made and scored in memory, kept in a study that can be taken up again, and the best of
them is tested on items that none of them has seen."""
