"""A conflict between two facts, and how messages name the facts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from workbench.facts.facts import Fact

Status = Literal["failed", "warning"]


@dataclass(frozen=True)
class Conflict:
    """Two facts, or a fact and a prompt, that contradict each other or are redundant.

    Attributes:
        kind: contradiction, duplicate, reverse, composite, paraphrase, neighbour or portability.
        status: "failed" if one of the two must be removed, "warning" if they may both be right.
        fact: The later fact.
        other: The earlier fact; the same fact if one of its own prompts contradicts it.
        what: Description of the conflict, without its place.
        repair: The edit of the file that resolves it.
    """

    kind: str
    status: Status
    fact: Fact
    other: Fact
    what: str
    repair: str

    @property
    def place(self) -> str:
        """The file and line of the later fact, as file:line."""
        return self.fact.place


def distinct(candidates: Iterable[Conflict]) -> list[Conflict]:
    """Keep the first conflict of each kind between two facts, so that several wordings of one question count once."""
    first: dict[tuple[str, int, int], Conflict] = {}
    for conflict in candidates:
        first.setdefault((conflict.kind, id(conflict.fact), id(conflict.other)), conflict)
    return list(first.values())


def place_of(fact: Fact, seen_from: Fact) -> str:
    """Return a fact's place, or only its line if both facts are in one file."""
    file, mark, line = re.fullmatch(r"(.*?)(:|, row )?(\d*)", fact.place, re.DOTALL).groups()  # type: ignore[union-attr]
    if not mark or not seen_from.place.startswith(f"{file}{mark}"):
        return fact.place
    return "this line" if fact is seen_from else f"{'line' if mark == ':' else 'row'} {line}"


def statement(fact: Fact) -> str:
    """Return a fact as quoted text: its prompt and target."""
    return repr(f"{fact.text}{fact.continuation}")
