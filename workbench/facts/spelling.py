"""Misspelt subjects: the one that the scorecard asks about, and others that edits learn from."""

from __future__ import annotations

import re
from collections.abc import Iterator

from workbench.facts.facts import UNSPACED, Fact
from workbench.ground.files import json_digest

_WORD = re.compile(r"[^\W\d_]{4,}")


def misspelt(fact: Fact) -> str | None:
    """Return a fact's subject with two letters swapped in the middle of its longest word; None without such a word."""
    for word in sorted(_words(fact), key=lambda word: len(word.group()), reverse=True):
        letters = word.group()
        for i in sorted(range(1, len(letters) - 1), key=lambda i: abs(2 * i - len(letters) + 1)):
            if letters[i].lower() != letters[i + 1].lower():
                return _swapped(word, i)
    return None


def misspellings(fact: Fact, most: int) -> list[str]:
    """Return a fact's subject with one slip of the fingers each: two letters swapped, one left out, one twice.

    The first letter of a word is always right, and the spelling that `misspelt` returns is left out, so that scores on it say what an edit
    does with a slip that it has not seen.

    Args:
        fact: The fact.
        most: Largest number of spellings. They are in the order of their digests: every n-th slip could be of one word or of one kind.
    """
    left = {text for word in _words(fact) for text in _slips(word)} - {fact.subject, misspelt(fact)}
    return sorted(left, key=json_digest)[:most]


def _words(fact: Fact) -> list[re.Match[str]]:
    """Return the words of a fact's subject in which letters can be swapped."""
    return [] if fact.subject is None or UNSPACED.search(fact.subject) else list(_WORD.finditer(fact.subject))


def _slips(word: re.Match[str]) -> Iterator[str]:
    """Yield the subject with one slip in a word."""
    text, start, end = word.string, *word.span()
    for i in range(start + 1, end):
        if i + 1 < end:
            yield _swapped(word, i - start)
        yield text[:i] + text[i + 1 :]
        yield text[:i] + text[i] + text[i:]


def _swapped(word: re.Match[str], i: int) -> str:
    """Return the subject with letter i of a word and the next one swapped."""
    at, text = word.start() + i, word.string
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
