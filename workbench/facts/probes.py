"""Conflicts between facts and the prompts that test them, and how messages name the facts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.facts.facts import SLOT, Fact, Probe, folded
from workbench.facts.relations import keys_of, wordings

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


def probe_conflicts(facts: Sequence[Fact]) -> list[Conflict]:
    """Return conflicts between the test prompts of facts.

    These are neighbours and portability prompts whose answer another fact changes, and paraphrases and portability prompts that two
    facts share with different answers.
    """
    edits = edited_prompts(facts)
    result = []
    portability: dict[str, tuple[str, Fact]] = {}
    paraphrases: dict[str, Fact] = {}
    for fact in facts:
        for text in fact.paraphrases:
            other = paraphrases.setdefault(folded(text), fact)
            if folded(other.target) != folded(fact.target):
                result.append(_paraphrase_conflict(fact, text, other))
        for probe in fact.neighbours:
            result += [_neighbour_conflict(fact, probe, other) for other in changing(probe, edits)]
        for probe in fact.portability:
            text, target = folded(probe.prompt), folded(probe.target or "")
            result += [
                _portability_conflict(fact, probe, other, other.target)
                for other in edits.get(text, ())
                if folded(other.target) != target
            ]
            answer, other = portability.setdefault(text, (probe.target or "", fact))
            if folded(answer) != target:
                result.append(_portability_conflict(fact, probe, other, answer))
    return distinct(result)


def edited_prompts(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Map each normalized prompt for a fact, in every known wording of its relation, to the facts that it asks for."""
    prompts = wordings(facts)
    edits: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        for text in _statements(fact, prompts):
            edits[text].append(fact)
    return edits


def changing(neighbour: Probe, edits: Mapping[str, Sequence[Fact]]) -> list[Fact]:
    """Return the facts that change a neighbour's answer.

    Args:
        neighbour: The prompt whose answer must not change.
        edits: The facts by prompt; see `edited_prompts`.
    """
    return [
        fact
        for fact in edits.get(folded(neighbour.prompt), ())
        if neighbour.target is None or folded(neighbour.target) != folded(fact.target)
    ]


def _statements(fact: Fact, prompts: dict[str, set[str]]) -> set[str]:
    """Return all prompts for a fact: its own texts, and its subject in every wording of its relation."""
    texts = {folded(fact.text), *(folded(text) for text in fact.paraphrases)}
    if fact.subject is not None:
        subject = folded(fact.subject)
        texts |= {text.replace(SLOT, subject) for key in keys_of(fact) for text in prompts[key]}
    return texts


def _neighbour_conflict(fact: Fact, probe: Probe, other: Fact) -> Conflict:
    expected = f"the answer {probe.target!r}" if probe.target is not None else "the base's answer"
    source = "this fact itself teaches" if other is fact else f"{place_of(other, fact)} teaches"
    return Conflict(
        "neighbour",
        "failed",
        fact,
        other,
        f"the neighbour {probe.prompt!r} must keep {expected}, and {source} {other.target!r}",
        "Delete the neighbour." if other is fact else f"Delete the neighbour, or {place_of(other, fact)}.",
    )


def _paraphrase_conflict(fact: Fact, text: str, other: Fact) -> Conflict:
    return Conflict(
        "paraphrase",
        "failed",
        fact,
        other,
        f"the paraphrase {text!r} asks for {fact.target!r} here, in {place_of(other, fact)} for {other.target!r}",
        "Delete it if it does not ask for the fact.",
    )


def _portability_conflict(fact: Fact, probe: Probe, other: Fact, answer: str) -> Conflict:
    return Conflict(
        "portability",
        "failed",
        fact,
        other,
        f"the portability prompt {probe.prompt!r} expects {probe.target!r}, and {place_of(other, fact)} {answer!r}",
        "Keep one answer: change the prompt's target, or delete it.",
    )
