"""Prompts whose answers must not move: their keys join the metric of the solve."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from workbench import jsondoc
from workbench.edit.closed_form.values import keys_of
from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import Position
from workbench.errors import WorkbenchError, refuse_misspelt
from workbench.facts import Fact
from workbench.steps import MethodContext

_FIELDS = ("prompt", "text", "subject", "neighbours")
_EXPECTED = 'Expected {"prompt": "..."}, {"text": "..."} or a fact with neighbours a line.'


def read_prompts(path: Path, shown: str) -> list[Fact]:
    """Prompts of a jsonl, as facts without an answer: each with its subject where the line names one.

    Errors, with file and line: missing file, not JSON, no prompt.
    """
    if not path.is_file():
        raise WorkbenchError(f"{shown}: no such file of prompts to preserve", "Paths start at the project folder.")
    found: dict[tuple[str, str | None], Fact] = {}
    for number, row in jsondoc.lines(path, shown, _EXPECTED):
        place = f"{shown}:{number}"
        for prompt, subject in _prompts(row, place):
            fact = Fact(f"preserve-{len(found)}", prompt, subject, ".", place=place)
            found.setdefault((fact.text, subject), fact)
    if not found:
        raise WorkbenchError(f"{shown}: no prompts to preserve", _EXPECTED)
    return list(found.values())


def _prompts(row: object, place: str) -> list[tuple[str, str | None]]:
    if not isinstance(row, dict):
        raise WorkbenchError(f"{place}: expected an object, found {type(row).__name__}", _EXPECTED)
    refuse_misspelt(row, _FIELDS, place)
    if row.get("neighbours"):
        if not isinstance(row["neighbours"], list):
            raise WorkbenchError(f"{place}: expected a list of prompts in 'neighbours'", _EXPECTED)
        return [(_neighbour(entry, place), None) for entry in row["neighbours"]]
    text = row.get("prompt", row.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise WorkbenchError(f"{place}: no prompt", _EXPECTED)
    subject = row.get("subject")
    if not isinstance(subject, str) or "{subject}" in text:
        return [(text, subject if isinstance(subject, str) else None)]
    return [(text.replace(subject, "{subject}"), subject)] if text.count(subject) == 1 else [(text, None)]


def _neighbour(entry: object, place: str) -> str:
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str) or not prompt.strip():
        raise WorkbenchError(f"{place}: expected a prompt, or {{\"prompt\"}}, in 'neighbours', found {entry!r}", _EXPECTED)
    return prompt


def preserved_keys(context: MethodContext, parts: Parts, layer: int, position: Position, before: list[str], shown: str) -> Tensor:
    """Keys [prompt, d_in] of the prompts, at the same position as the facts'."""
    prompts = read_prompts(context.project / shown, shown)
    keys, _ = keys_of(context, parts, layer, [(prompt,) for prompt in prompts], position, before)
    return keys
