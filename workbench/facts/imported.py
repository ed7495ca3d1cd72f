"""Conversion of published facts to the project's own format, without contradictions and with more neighbours if wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from workbench.facts.conflicts import contradictions
from workbench.facts.facts import Fact, Probe
from workbench.facts.probes import changing, edited_prompts, place_of
from workbench.facts.published import Published, Skip, read_all
from workbench.results import Part


class ImportedFacts(Part):
    """Conversion of a published facts dataset."""

    format: str
    """Format of the file."""
    facts: int
    """Number of facts."""
    out: str | None
    """File that was written; null without `--out`."""
    skipped: list[Skip]
    """Rows that were skipped."""


def import_facts(path: Path, label: str, limit: int | None = None, neighbours: int = 0) -> Published:
    """Read the facts of a file; a fact that contradicts an earlier one is skipped.

    Args:
        path: A published file, or one in the project's own format.
        label: The file's name in messages.
        limit: Largest number of facts, from the start of the file.
        neighbours: Number of neighbours to reach by adding some from the file's other facts; see `rebuild_neighbours`.

    Raises:
        WorkbenchError: If the file is invalid; see `read_all`.
    """
    read = read_all(path, label)
    distinct = _distinct(read.facts)
    facts, skipped = consistent(distinct)
    if limit is not None and limit < len(facts):
        facts, skipped = consistent(distinct[: distinct.index(facts[limit - 1]) + 1])
    if neighbours:
        facts = rebuild_neighbours(facts, read.facts, neighbours)
    facts, changed = without_edited_neighbours(facts)
    return Published(facts, [*read.skipped, *skipped, *changed], read.format)


def _distinct(facts: Iterable[Fact]) -> list[Fact]:
    """Remove facts that repeat an earlier fact's prompt and target, as `read_facts` does."""
    return list({(fact.text, fact.target): fact for fact in reversed(list(facts))}.values())[::-1]


def consistent(facts: Sequence[Fact]) -> tuple[list[Fact], list[Skip]]:
    """Split facts into those without a contradiction to an earlier remaining fact, and the skipped ones."""
    remaining, skipped = list(facts), []
    while pairs := contradictions(remaining):
        # Skip a fact only if the earlier fact of its pair remains; the other pairs are checked again in the next round.
        later = {id(conflict.fact) for conflict in pairs}
        final = [conflict for conflict in pairs if id(conflict.other) not in later]
        skipped += [Skip(place=conflict.place, reason=f"contradiction: {conflict.what}") for conflict in final]
        remaining = [fact for fact in remaining if id(fact) not in {id(conflict.fact) for conflict in final}]
    return remaining, skipped


def without_edited_neighbours(facts: Sequence[Fact]) -> tuple[list[Fact], list[Skip]]:
    """Remove neighbours whose answers one of the facts changes: the edit is meant to change them, so they would count as damage.

    Returns:
        The facts, and a skipped part for each removed neighbour.
    """
    edits, kept, skipped = edited_prompts(facts), [], []
    for fact in facts:
        removed = {probe: edit for probe in fact.neighbours for edit in changing(probe, edits)[:1]}
        kept.append(
            replace(fact, neighbours=tuple(probe for probe in fact.neighbours if probe not in removed)) if removed else fact
        )
        skipped += [Skip(place=fact.place, reason=_edited(probe, edit, fact)) for probe, edit in removed.items()]
    return kept, skipped


def _edited(probe: Probe, edit: Fact, fact: Fact) -> str:
    """Return the reason for removing a neighbour; the answers of several hops may rely on it."""
    reason = f"the neighbour {probe.prompt!r} was skipped, because {place_of(edit, fact)} edits its answer to {edit.target!r}"
    return (
        f"{reason}; portability prompts may rely on the answer {probe.target!r}" if fact.portability and probe.target else reason
    )


def rebuild_neighbours(facts: Sequence[Fact], source: Iterable[Fact], count: int) -> list[Fact]:
    """Add neighbours as in CounterFact: prompts for the same relation of other subjects with the same true answer.

    Meng et al. 2022 (ROME, arXiv 2202.05262, section 3.4) define these neighbourhood prompts. Here they come from other rows of the file
    instead of Wikidata.

    Args:
        facts: The facts that will be edited.
        source: Facts that provide the other subjects. Subjects that `facts` edit in the same relation are not used.
        count: Number of neighbours of a fact up to which some are added; own neighbours are never removed.
    """
    edited = {(fact.relation, fact.subject) for fact in facts}
    candidates: dict[tuple[str, str | None], list[Probe]] = {}
    for fact in source:
        if fact.target_true is not None and fact.subject is not None and (fact.relation, fact.subject) not in edited:
            candidates.setdefault((fact.relation, fact.target_true), []).append(Probe(fact.text, fact.target_true))
    extended = []
    for fact in facts:
        matching = candidates.get((fact.relation, fact.target_true), [])
        probes = tuple(dict.fromkeys((*fact.neighbours, *matching)))
        extended.append(replace(fact, neighbours=probes[: max(count, len(fact.neighbours))]))
    return extended
