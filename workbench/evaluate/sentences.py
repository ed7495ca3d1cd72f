"""A sentence around an answer from which a filter's regular expression extracts the answer."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LONGEST = 2000
_ALPHABET = (" ", "a", "0", ".", "A", "(", ")", "-")


def sentence_for(pattern: str, answer: str) -> str | None:
    r"""Return a text in which the pattern matches the answer as its first group, or as the whole match if it has no group.

    >>> sentence_for(r"(?i)the answer is:? \(?([A-D])\)?", "B")
    'the answer is B'

    Returns None if no such text is found: the answer does not fit the group, or the pattern has parts that are not supported
    here.
    """
    try:
        compiled = re.compile(pattern)
        parsed = importlib.import_module("re._parser").parse(pattern)
    except (re.error, ImportError, AttributeError, RecursionError):
        return None
    for group in range(1, compiled.groups + 1) if compiled.groups else (0,):
        try:
            text = "".join(_shortest_texts(parsed, answer, _Place(group)))
        except (ValueError, RecursionError, NotImplementedError):
            continue
        match = compiled.search(text) if len(text) <= _LONGEST else None
        if match and answer in {part.strip() for part in (match.group(), *(g for g in match.groups() if g))}:
            return text
    return None


@dataclass
class _Place:
    """Place of the answer in a pattern.

    Attributes:
        group: Number of the group, or 0 for the first repeat of a set of characters.
        open: Whether the place has not been reached yet.
    """

    group: int
    open: bool = True


def _shortest_texts(parsed: Iterable[tuple[Any, Any]], answer: str, place: _Place) -> Iterable[str]:
    """Yield the shortest texts of the pattern's parts, one after another, with the answer in its place."""
    for code, argument in parsed:
        kind = str(code)
        if kind == "LITERAL":
            yield chr(argument)
        elif kind == "SUBPATTERN":
            group, *_, inner = argument
            if group is not None and group == place.group:
                place.open = False
                yield answer
            else:
                yield from _shortest_texts(inner, answer, place)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            minimum, _, inner = argument
            if place.group == 0 and place.open and str(inner[0][0]) in ("IN", "ANY"):
                place.open = False
                yield answer
            elif place.group and str(inner[0][0]) == "SUBPATTERN" and inner[0][1][0] == place.group:
                yield from _shortest_texts(inner, answer, place)
            else:
                for _ in range(min(minimum, 20)):
                    yield from _shortest_texts(inner, answer, place)
        elif kind == "BRANCH":
            yield from _shortest_texts(argument[1][0], answer, place)
        elif kind == "ASSERT":
            yield from _shortest_texts(argument[1], answer, place)
        elif kind in ("IN", "ANY", "CATEGORY", "NOT_LITERAL"):
            yield _letter(code, argument)
        elif kind == "ATOMIC_GROUP":
            yield from _shortest_texts(argument, answer, place)
        elif kind not in ("AT", "ASSERT_NOT"):
            raise NotImplementedError(kind)


def _letter(code: Any, argument: Any) -> str:
    """Return a character that matches one part."""
    kind = str(code)
    if kind == "ANY":
        return "."
    if kind == "NOT_LITERAL":
        return next(c for c in _ALPHABET if ord(c) != argument)
    members = argument if kind == "IN" else [(code, argument)]
    negated = any(str(inner) == "NEGATE" for inner, _ in members)
    for inner, value in members:
        if str(inner) == "LITERAL" and not negated:
            return chr(value)
    fitting = [c for c in _ALPHABET if any(_matches(str(inner), value, c) for inner, value in members) is not negated]
    if not fitting:
        raise NotImplementedError(kind)
    return fitting[0]


def _matches(kind: str, value: Any, character: str) -> bool:
    """Return True if a character matches one member of a set."""
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    if kind == "LITERAL":
        return bool(ord(character) == value)
    if kind == "CATEGORY":
        name = str(value).removeprefix("CATEGORY_")
        holds = {"SPACE": character.isspace(), "DIGIT": character.isdigit(), "WORD": character.isalnum() or character == "_"}
        return holds[name.removeprefix("NOT_")] is not name.startswith("NOT_")
    return False
