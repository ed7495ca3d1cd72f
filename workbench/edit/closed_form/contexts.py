"""Texts before prompts, so that keys and values hold after more than one beginning."""

from __future__ import annotations

from collections.abc import Sequence

WORDS = 8


def contexts(texts: Sequence[str], count: int) -> list[str]:
    """Return the first words of `count` texts, taken from those for second moments.

    MEMIT lets the model write them. Small instruction-tuned models continue a lone "The" with noise, and sampled texts differ
    between runs.
    """
    beginnings: list[str] = []
    for text in texts:
        if len(beginnings) == count:
            break
        words = text.split()[:WORDS]
        if len(words) == WORDS:
            beginnings.append(" ".join(words).rstrip(".,;:!?"))
    return beginnings
