"""Texts in front of prompts, so that a key and a value hold behind more than one beginning."""

from __future__ import annotations

from collections.abc import Sequence

WORDS = 8


def contexts(texts: Sequence[str], count: int) -> list[str]:
    """The first words of `count` texts, those that second moments are taken on.

    MEMIT lets the model itself write them; small instruction-tuned models continue a lone "The" with noise, and sampled ones differ
    from run to run.
    """
    found: list[str] = []
    for text in texts:
        if len(found) == count:
            break
        words = text.split()[:WORDS]
        if len(words) == WORDS:
            found.append(" ".join(words).rstrip(".,;:!?"))
    return found
