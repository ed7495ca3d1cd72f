"""Vocabularies: what tokenizers hold, how they differ, and models aligned to one of them by token string."""
