"""Misspelt subjects: the one that the scorecard asks about, and others that edits learn from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice, zip_longest

from workbench.facts.facts import UNSPACED, Fact

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
        most: Largest number of spellings; the slips are spread over the words.
    """
    slips = [list(_slips(word)) for word in _words(fact)]
    found = dict.fromkeys(
        text for place in zip_longest(*slips) for text in place if text not in (None, fact.subject, misspelt(fact))
    )
    step = max(1, -(-len(found) // most))
    return list(islice(found, 0, None, step))


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
