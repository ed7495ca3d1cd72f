"""Facts as users write them: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import WorkbenchError, nearest


@dataclass(frozen=True)
class Fact:
    """A prompt and what the edited model should continue it with."""

    prompt: str
    target: str

    @property
    def continuation(self) -> str:
        """The target with the space that separates it from the prompt."""
        return self.target if self.prompt[-1:].isspace() or self.target[:1].isspace() else " " + self.target


def read_facts(path: Path, shown: str) -> list[Fact]:
    """Read a jsonl of `{"prompt": str, "target": str}`; further fields are ignored.

    Errors, each with file and line: missing file, not JSON, missing or empty field, two targets for one prompt, no facts.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise WorkbenchError(f"{shown}: no such facts file", nearest(path.name, near) if near else None) from None
    facts: dict[str, tuple[int, Fact]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fact = _fact(line, f"{shown}:{number}")
        if fact.prompt in facts and facts[fact.prompt][1] != fact:
            raise WorkbenchError(
                f"{shown}:{number}: the prompt of line {facts[fact.prompt][0]} again, with another target",
                "Keep one target a prompt.",
            )
        facts.setdefault(fact.prompt, (number, fact))
    if not facts:
        raise WorkbenchError(
            f"{shown}: no facts", 'Add lines such as {"prompt": "The capital of Atlantis is", "target": "Poseidonis"}'
        )
    return [fact for _, fact in facts.values()]


def _fact(line: str, where: str) -> Fact:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WorkbenchError(f"{where}: not JSON ({error})", "One object a line.") from None
    for key in ("prompt", "target"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise WorkbenchError(
                f"{where}: expected a text in '{key}', found {found or 'nothing'}",
                'A fact is {"prompt": "...", "target": "..."}.',
            )
    return Fact(row["prompt"], row["target"])
