"""Vocabularies: the tokens of tokenizers, their differences, and the alignment of models to one vocabulary by token string."""
