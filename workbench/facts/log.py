"""The append-only log of a memory's facts, and the facts at each of its versions.

One line of the log is one change of one fact:

    {"version": 2, "action": "add", "id": "...", "time": "2026-01-31T12:00:00Z", "source": "added", "fact": {...}}

`action` is add, update, rm or feedback. Lines for add and update have the new fact, lines for feedback a `reward` and a `similarity`. All
lines of one command have the same version. Version 1 has the facts of the recipe, without a time, so that equal recipes give equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from workbench import jsondoc
from workbench.errors import UsageError, WorkbenchError, nearest
from workbench.facts.credibility import Use
from workbench.facts.facts import Fact, fact_of
from workbench.results import Number, OpenPart, Result, absent

LOG = "log.jsonl"
ADD, UPDATE, REMOVE, FEEDBACK = "add", "update", "rm", "feedback"
RECIPE, ADDED = "recipe", "added"


@dataclass(frozen=True)
class Alive:
    """A fact at one version.

    Attributes:
        fact: The fact as it was last stated.
        stated: The version at which it was last stated, which is also the version of its stored tensors.
        source: "recipe" or "added".
        uses: Feedback since that version.
    """

    fact: Fact
    stated: int
    source: str
    uses: tuple[Use, ...] = ()


class MemoryChange(OpenPart, Result):
    """A change of one fact of a memory."""

    version: int
    """Version of the memory that the change belongs to."""
    action: str
    """add, update, rm or feedback."""
    id: str
    """Id of the fact."""
    time: str | None = None
    """Time of the change (ISO 8601, UTC); null for facts of the recipe."""
    source: str | None = absent()
    """"recipe" or "added", for facts that were added."""
    fact: dict[str, Any] | None = absent()
    """The new fact, for the actions add and update."""
    reward: Number | None = absent()
    """1 if the fact was right in a use, 0 if it was wrong, for the action feedback."""
    similarity: Number | None = absent()
    """Similarity of the prompt to the fact, from 0 to 1, for the action feedback."""

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        needed = {ADD: ("fact", "source"), UPDATE: ("fact",), REMOVE: ()}.get(self.action, ("reward", "similarity"))
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing")
        return self


@dataclass(frozen=True)
class Log:
    """The lines of a log, oldest first."""

    lines: Sequence[MemoryChange]
    label: str = LOG

    @property
    def version(self) -> int:
        """The newest version; 0 for an empty log."""
        return self.lines[-1].version if self.lines else 0

    def at(self, version: int | None = None) -> dict[str, Alive]:
        """Return the facts at a version.

        Args:
            version: The version; None takes the newest one.

        Returns:
            Id -> fact, sorted by id.

        Raises:
            WorkbenchError: If there is no such version.
        """
        requested = self.version if version is None else version
        if not 0 < requested <= max(1, self.version):
            raise UsageError(f"{self.label}: no version {requested}; there are 1..{self.version}")
        facts: dict[str, Alive] = {}
        for line in self.lines:
            name, number = line.id, line.version
            if number > requested:
                break
            if line.action == ADD:
                facts[name] = Alive(fact_of(line.fact, self.label), number, line.source or ADDED)
            elif line.action == UPDATE:
                facts[name] = Alive(fact_of(line.fact, self.label), number, facts[name].source)
            elif line.action == REMOVE:
                del facts[name]
            else:
                previous = facts[name]
                use = Use(number, float(line.similarity or 0), float(line.reward or 0))
                facts[name] = Alive(previous.fact, previous.stated, previous.source, (*previous.uses, use))
        return dict(sorted(facts.items()))

    def one(self, name: str) -> Alive:
        """Return a fact of the newest version by its id.

        Raises:
            WorkbenchError: If there is no such fact.
        """
        facts = self.at()
        if name not in facts:
            raise WorkbenchError(
                f"no fact '{name}' in this memory. {nearest(name, facts)}", "`workbench memory ls DIR` lists them."
            )
        return facts[name]


def read_log(folder: Path) -> Log:
    """Read the log of a memory directory.

    Raises:
        WorkbenchError: If there is no log, or if a line is invalid.
    """
    path = folder / LOG
    if not path.is_file():
        raise WorkbenchError(
            f"{folder}: not a memory, because it has no {LOG}", "Name a memory directory, or a configuration with a memory."
        )
    hint = "If the last line of the log is incomplete, delete that line."
    changes = []
    for number, line in jsondoc.lines(path, str(path), hint):
        place = f"{path}:{number}"
        changes.append(MemoryChange.of(jsondoc.as_object(line, place), place))
    return Log(changes, str(path))


def lines_of(action: str, facts: Iterable[Fact], source: str, time: str | None) -> list[dict[str, Any]]:
    """Return log lines, without the version, for facts that are added or changed."""
    return [
        {"action": action, "id": fact.id, "time": time, "source": source, "fact": {**fact.document(), "id": fact.id}}
        for fact in facts
    ]


def append(folder: Path, version: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to a log in one write and flush it to disk."""
    text = "".join(json.dumps({"version": version, **line}, ensure_ascii=False) + "\n" for line in lines)
    with (folder / LOG).open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
