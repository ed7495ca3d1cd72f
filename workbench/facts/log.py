"""Facts over time: an append-only log of what was added, changed, taken out and rewarded, and what it says at each version.

One line of the log is one change of one fact:

    {"version": 2, "action": "add", "id": "...", "time": "2026-01-31T12:00:00Z", "source": "added", "fact": {...}}

`action` is add, update, rm or feedback; add and update hold the fact as it then is, feedback a `reward` and a `similarity`. Lines of one
command have one version; version 1 is what the recipe brought, without a time, so that equal recipes give equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import jsondoc
from workbench.errors import WorkbenchError, nearest
from workbench.facts.credibility import Use
from workbench.facts.facts import Fact, fact_of

LOG = "log.jsonl"
ADD, UPDATE, REMOVE, FEEDBACK = "add", "update", "rm", "feedback"
RECIPE, ADDED = "recipe", "added"


@dataclass(frozen=True)
class Alive:
    """A fact at some version.

    Attributes:
        fact: As it was last stated.
        stated: The version of that; also that of its stored tensors.
        source: "recipe" or "added".
        uses: Feedback since then.
    """

    fact: Fact
    stated: int
    source: str
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True)
class Log:
    """The lines of a log, oldest first."""

    lines: Sequence[Mapping[str, Any]]
    shown: str = LOG

    @property
    def version(self) -> int:
        """The newest version; 0 for an empty log."""
        return int(self.lines[-1]["version"]) if self.lines else 0

    def at(self, version: int | None = None) -> dict[str, Alive]:
        """Facts at a version by id, ids in order. Errors: a version that does not exist."""
        wanted = self.version if version is None else version
        if not 0 < wanted <= max(1, self.version):
            raise WorkbenchError(f"{self.shown}: no version {wanted}; there are 1..{self.version}", None, 2)
        found: dict[str, Alive] = {}
        for line in self.lines:
            if line["version"] > wanted:
                break
            name, number = str(line["id"]), int(line["version"])
            if line["action"] == ADD:
                found[name] = Alive(fact_of(line["fact"], self.shown), number, str(line["source"]))
            elif line["action"] == UPDATE:
                found[name] = Alive(fact_of(line["fact"], self.shown), number, found[name].source)
            elif line["action"] == REMOVE:
                del found[name]
            else:
                old = found[name]
                use = Use(number, float(line["similarity"]), float(line["reward"]))
                found[name] = Alive(old.fact, old.stated, old.source, (*old.uses, use))
        return dict(sorted(found.items()))

    def one(self, name: str) -> Alive:
        """A fact of the newest version. Errors: no such fact."""
        known = self.at()
        if name not in known:
            raise WorkbenchError(
                f"no fact '{name}' in this memory. {nearest(name, known)}", "`workbench memory ls DIR` lists them."
            )
        return known[name]


def read_log(folder: Path) -> Log:
    """A memory directory's log. Errors: none there, a line that is no JSON."""
    path = folder / LOG
    if not path.is_file():
        raise WorkbenchError(
            f"{folder}: no {LOG}, so not a memory", "Name a memory directory, or a configuration that holds one."
        )
    hint = "If the log ends in a line cut short, take that line out."
    lines = [_checked(line, f"{path}:{number}") for number, line in jsondoc.lines(path, str(path), hint)]
    return Log(lines, str(path))


def _checked(line: Any, place: str) -> dict[str, Any]:
    """Return a line of the log, checked. Raises WorkbenchError for one that no version of the workbench writes."""
    entry = jsondoc.as_object(line, place)
    fields = {"version": int, "action": str, "id": str}
    if entry.get("action") in (ADD, UPDATE):
        fields |= {"fact": dict} | ({"source": str} if entry["action"] == ADD else {})
    elif entry.get("action") not in (REMOVE, None):
        fields |= {"similarity": (int, float), "reward": (int, float)}  # type: ignore[dict-item]
    for name, kind in fields.items():
        if not isinstance(entry.get(name), kind):
            raise WorkbenchError(f"{place}: {name}: found {jsondoc.kind(entry.get(name))}, which no memory's log has there", None)
    return entry


def lines_of(action: str, facts: Iterable[Fact], source: str, time: str | None) -> list[dict[str, Any]]:
    """Lines, but for the version, of facts that are added or changed."""
    return [
        {"action": action, "id": fact.id, "time": time, "source": source, "fact": {**fact.document(), "id": fact.id}}
        for fact in facts
    ]


def append(folder: Path, version: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a log, in one write that has reached the disk when this returns."""
    text = "".join(json.dumps({"version": version, **line}, ensure_ascii=False) + "\n" for line in lines)
    with (folder / LOG).open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
