"""Facts as rows of published benchmarks state them, and access to the nested values of these rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Pair = tuple[Any, Any]
# Keys of the answer to a test prompt, in the order in which they are looked up.
ANSWERS = ("ground_truth", "target", "answer", "targets", "answers", "loc_ans")


class SkippedRowError(ValueError):
    """The reason for skipping a row."""


@dataclass(frozen=True)
class Draft:
    """A fact as a published row states it, with unchecked values, before its subject is located in the prompt.

    Attributes:
        prompt: The prompt; `{}` stands for the subject, which may also be written out.
        subject: The subject, or None.
        target: The new answer, or a list of its wordings.
        true: The true answer, or a list of its wordings.
        relation: Name of the relation.
        id: The fact's name.
        paraphrases: Other wordings of the prompt.
        neighbours: Prompts whose answers must not change, and their answers.
        portability: Prompts whose answers follow from the fact, and their answers.
        aliases: Further wordings of the target.
        names_subject: False for sets whose questions name no subject: a missing subject is then no reason to skip the row.
        notes: Reasons for which parts of the row were skipped.
    """

    prompt: Any
    subject: Any
    target: Any
    true: Any = None
    relation: Any = None
    id: str | None = None
    paraphrases: Iterable[Any] = ()
    neighbours: Iterable[Pair] = ()
    portability: Sequence[Pair] = ()
    aliases: Iterable[Any] = ()
    names_subject: bool = True
    notes: Sequence[str] = ()


def text_of(value: Any) -> str | None:
    """Return the text of a nested value: a text, a number, {"str": …}, or the first text of a list."""
    if isinstance(value, Mapping):
        return text_of(value.get("str", value.get("value")))
    if isinstance(value, (list, tuple)):
        return next((text for entry in value if (text := text_of(entry)) is not None), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def list_of(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty list, and any other value as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def mappings_of(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings of a list, without its other entries."""
    return [entry for entry in list_of(value) if isinstance(entry, Mapping)]


def prompt_and_answer(entry: Any) -> Pair:
    """Return (prompt, answer or None) from a text or a mapping."""
    if not isinstance(entry, Mapping):
        return entry, None
    return entry.get("prompt", entry.get("loc")), next((entry[key] for key in ANSWERS if key in entry), None)
