"""Published facts in the project's own format: consistent, cut to a number, with neighbours rebuilt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from workbench.facts.conflicts import contradictions
from workbench.facts.facts import Fact, Probe
from workbench.facts.published import Published, Skip
from workbench.facts.reading import read_all


def import_facts(path: Path, shown: str, limit: int | None = None, neighbours: int = 0) -> Published:
    """The facts of a file without those that contradict an earlier one, which count as skipped.

    Args:
        path: A published file, or one of the project's own.
        shown: How places call it.
        limit: So many facts, the first ones.
        neighbours: Add neighbours from the file's other facts until a fact has so many, see `rebuild_neighbours`.

    Errors: as `read_all`.
    """
    read = read_all(path, shown)
    distinct = _distinct(read.facts)
    facts, skipped = consistent(distinct)
    if limit is not None and limit < len(facts):
        facts, skipped = consistent(distinct[: distinct.index(facts[limit - 1]) + 1])
    if neighbours:
        facts = rebuild_neighbours(facts, read.facts, neighbours)
    return Published(facts, [*read.skipped, *skipped], read.format)


def _distinct(facts: Iterable[Fact]) -> list[Fact]:
    """The facts, each prompt with its target once; `read_facts` counts them so too."""
    return list({(fact.text, fact.target): fact for fact in reversed(list(facts))}.values())[::-1]


def consistent(facts: Sequence[Fact]) -> tuple[list[Fact], list[Skip]]:
    """The facts that contradict no earlier one that stays, and the others."""
    kept, skipped = list(facts), []
    while found := contradictions(kept):
        # A fact goes where the earlier one stays: what contradicts only a fact that goes is looked at again.
        going = {id(conflict.fact) for conflict in found}
        gone = [conflict for conflict in found if id(conflict.other) not in going]
        skipped += [Skip(conflict.place, f"contradiction: {conflict.what}") for conflict in gone]
        kept = [fact for fact in kept if id(fact) not in {id(conflict.fact) for conflict in gone}]
    return kept, skipped


def rebuild_neighbours(facts: Sequence[Fact], source: Iterable[Fact], count: int) -> list[Fact]:
    """Facts with neighbours of CounterFact's kind: the same relation asked of other subjects that have the same true answer.

    Args:
        facts: What will be edited.
        source: Where other subjects come from; those that `facts` edit in the same relation are no neighbours.
        count: Neighbours a fact has afterwards, at most, its own first; more of its own stay.

    Neighbourhood prompts as Meng et al. 2022 (ROME, arXiv 2202.05262, section 3.4) define them, from rows of the file instead of Wikidata.
    """
    edited = {(fact.relation, fact.subject) for fact in facts}
    others: dict[tuple[str, str | None], list[Probe]] = {}
    for fact in source:
        if fact.target_true is not None and fact.subject is not None and (fact.relation, fact.subject) not in edited:
            others.setdefault((fact.relation, fact.target_true), []).append(Probe(fact.text, fact.target_true))
    found = []
    for fact in facts:
        more = others.get((fact.relation, fact.target_true), [])
        probes = tuple(dict.fromkeys((*fact.neighbours, *more)))
        found.append(replace(fact, neighbours=probes[: max(count, len(fact.neighbours))]))
    return found
