"""What edit steps read: fields that several methods share, facts, texts before prompts, prompts to preserve, and data of the workbench."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from workbench.facts.facts import Fact
from workbench.facts.published import read_facts
from workbench.facts.stream import Start, read_stream
from workbench.ground import jsondoc
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, refuse_misspelt
from workbench.ground.lazy import torch
from workbench.steps.fields import Strict, Whole


class Batches(Strict):
    """Batches of facts that are edited one after another."""

    batch: Whole = Field(ge=1)
    """Number of facts per batch, in the order of the file; the last batch may be smaller."""


class Sequential(Strict):
    """Edit batch after batch, each on the model that the earlier batches have produced."""

    sequential: Batches


Mode = Annotated[
    Annotated[Literal["joint"], Tag("joint")] | Annotated[Sequential, Tag("sequential")],
    Discriminator(lambda value: "sequential" if isinstance(value, (Mapping, Sequential)) else "joint"),
]
"""`joint`: all facts at once. `{sequential: {batch: N}}`: N facts at a time."""


Layers = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[tuple[Whole, ...], Field(min_length=1), Tag("layers")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "layers"),
]
"""Layer indices, or `auto`: the method chooses."""


def _distinct(value: Any) -> Any:
    if value != "auto" and len(set(value)) != len(value):
        raise ValueError(f"expected auto or distinct layers, found {list(value)}")
    return value


DistinctLayers = Annotated[Layers, AfterValidator(_distinct)]
"""The same, each index once."""


def read_for(
    mode: Literal["joint"] | Sequential, first: int | None, project: Path, file: str, start: Start | None = None
) -> list[Fact]:
    """Return the facts that a step writes, in order.

    Args:
        mode: In joint mode, facts are sorted by ID, so that the result does not depend on the order of the file. In sequential
            mode, they are the values of a `Stream`: an updated fact has several, a removed one has none.
        first: Number of rows that count; None: all.
        project: The project folder.
        file: The facts file, relative to it.
        start: The earlier stream that the file continues in sequential mode.

    Raises:
        WorkbenchError: If the file is invalid or has fewer rows than `first`, or no fact is left.
    """
    if mode == "joint":
        listed = read_facts(project / file, file)
        _check_first(first, len(listed), f"{file} has {len(listed)} facts")
        return sorted(listed[:first], key=lambda fact: fact.id)
    stream = read_stream(project / file, file, start)
    _check_first(first, len(stream.events), f"{file} has {len(stream.events)} rows")
    facts = stream.first(first).statements
    if not facts:
        raise WorkbenchError(
            f"{file}: no fact is left{f' after the first {first} rows' if first else ''}, because all are removed",
            "Add facts, or remove the step from the recipe.",
        )
    return facts


def _check_first(first: int | None, count: int, found: str) -> None:
    """Raise InvalidRecipeError if a file has fewer rows than `first`."""
    if first is not None and first > count:
        raise InvalidRecipeError(f"first is {first}, but {found}", f"Set first: {count}.")


_DATA = files("workbench.edit.closed_form") / "data"
STATISTICS = "statistics.jsonl.xz"
KNOWN = "known.jsonl"


def statistics_texts() -> list[str]:
    """Return paragraphs of English text for the second moments of keys, used if a recipe names no text.

    Their order is random but fixed in each release of the file, so that the first n are a fair sample. Sources and licenses are
    listed in `workbench/edit/closed_form/data/README.md`.
    """
    lines = lzma.decompress((_DATA / STATISTICS).read_bytes()).decode("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def known_facts() -> list[Fact]:
    """Return facts of common knowledge, each with its true answer, a counterfactual target, two paraphrases and three neighbors.

    No subject occurs in two facts, and no neighbor asks for an edited fact, so all of them can be edited at once. A small model
    knows only some of them; the caller must check which.
    """
    with as_file(_DATA / KNOWN) as path:
        return read_facts(path, KNOWN)


WORDS = 8


def contexts(texts: Sequence[str], count: int) -> list[str]:
    """Return the first words of `count` texts, taken from those for second moments.

    MEMIT lets the model write them. Small instruction-tuned models continue a lone "The" with noise, and sampled texts differ
    between runs.
    """
    beginnings: list[str] = []
    for text in texts:
        if len(beginnings) == count:
            break
        words = text.split()[:WORDS]
        if len(words) == WORDS:
            beginnings.append(" ".join(words).rstrip(".,;:!?"))
    return beginnings


_FIELDS = ("prompt", "text", "subject", "neighbours")
_EXPECTED = 'Each line must be {"prompt": "..."}, {"text": "..."} or a fact with neighbours.'


def read_prompts(path: Path, label: str) -> list[Fact]:
    """Read prompts from a JSONL file as facts without an answer, each with its subject if the line has one.

    Args:
        path: The file.
        label: Its name in error messages.

    Raises:
        WorkbenchError: If the file is missing, is not JSON or has no prompt; with file and line.
    """
    if not path.is_file():
        raise WorkbenchError(
            f"{label}: the file of prompts to preserve does not exist", "Paths are relative to the project folder."
        )
    prompts: dict[tuple[str, str | None], Fact] = {}
    for number, row in jsondoc.lines(path, label, _EXPECTED):
        place = f"{label}:{number}"
        for prompt, subject in _prompts(row, place):
            fact = Fact(f"preserve-{len(prompts)}", prompt, subject, ".", place=place)
            prompts.setdefault((fact.text, subject), fact)
    if not prompts:
        raise WorkbenchError(f"{label}: the file has no prompts to preserve", _EXPECTED)
    return list(prompts.values())


def _prompts(row: object, place: str) -> list[tuple[str, str | None]]:
    """Return the prompts of a row, each with its subject if it occurs exactly once."""
    if not isinstance(row, dict):
        raise WorkbenchError(f"{place}: expected an object, found {type(row).__name__}", _EXPECTED)
    refuse_misspelt(row, _FIELDS, place)
    if row.get("neighbours"):
        if not isinstance(row["neighbours"], list):
            raise WorkbenchError(f"{place}: expected a list of prompts in 'neighbours'", _EXPECTED)
        return [(_neighbour(entry, place), None) for entry in row["neighbours"]]
    text = row.get("prompt", row.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise WorkbenchError(f"{place}: the line has no prompt", _EXPECTED)
    subject = row.get("subject")
    if not isinstance(subject, str) or "{subject}" in text:
        return [(text, subject if isinstance(subject, str) else None)]
    return [(text.replace(subject, "{subject}"), subject)] if text.count(subject) == 1 else [(text, None)]


def _neighbour(entry: object, place: str) -> str:
    """Return the prompt of a neighbor, which is a text or an object with `prompt`."""
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str) or not prompt.strip():
        raise WorkbenchError(f"{place}: expected a prompt, or {{\"prompt\"}}, in 'neighbours', found {entry!r}", _EXPECTED)
    return prompt


def generated_prompts(facts: Sequence[Fact], count: int) -> list[Fact]:
    """Return prompts in the facts' own wordings that ask about other subjects: subjects of well-known facts, in a fixed random order.

    Neighbors of a fact, which an edit must not change, are worded as the fact is, with other subjects.

    Args:
        facts: Facts to write; those without a subject lend no wording.
        count: Number of prompts; fewer are returned if there are fewer pairs of a wording and a subject.
    """
    wordings = list(dict.fromkeys(fact.prompt for fact in facts if fact.subject is not None))
    edited = {fact.subject for fact in facts}
    subjects = [fact.subject for fact in known_facts() if fact.subject not in edited]
    pairs = [(wording, subject) for wording in wordings for subject in subjects]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [pairs[i] for i in order[:count]]
    return [
        Fact(f"generated-{i}", wording, subject, ".", place="preserve_generated") for i, (wording, subject) in enumerate(chosen)
    ]
