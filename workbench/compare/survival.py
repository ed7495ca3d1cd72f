"""Edited facts: which tasks say what of them, and how many of the facts that an edit alone answers right each configuration still answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from workbench.compare.tables import Table, roles_of
from workbench.facts.kinds import FactKind
from workbench.scores.statistics import codes, score_interval
from workbench.scores.store import Configuration, Scores
from workbench.scores.suite import FactTasks, Suite

# Kinds whose items are right (1) or wrong (0) answers with the edit's target.
SURVIVING: tuple[FactKind, ...] = ("efficacy", "paraphrase", "generated", "generated-paraphrase", "portability")
# Kinds that are shown after the first n facts.
FOLLOWED: tuple[FactKind, ...] = ("efficacy", "paraphrase", "generated", "neighbours", "portability")


def facts_of(tasks: Sequence[Table], suites: Mapping[str, Suite], entries: Sequence[Sequence[Scores]]) -> list[dict[str, Any]]:
    """One entry a suite that scores facts: tasks by kind, the number of facts, whether an edit was scored but not alone, what survives of
    each edit that something else holds, and scores after the first n facts.

    Args:
        entries: Scores of each configuration over all suites, as `configurations_of` gives them.
    """
    found = []
    for name, suite in suites.items():
        if suite.facts is None:
            continue
        tables = {kind: t for kind, task in suite.facts.tasks.items() for t in tasks if (t.name, t.suite.suite) == (task, name)}
        clusters = {item["cluster"] for kind, t in tables.items() if kind in SURVIVING for item in t.items}
        alone = _all_alone(entries, suite.facts)
        held = any(_edited(entry[0].configuration, suite.facts) for entry in entries)
        found.append({
            "suite": name, "source": suite.facts.source, "facts": len(clusters), "tasks": dict(suite.facts.tasks),
            "control_missing": held and not alone,
            "survival": list(_survivals(tables, suite.facts, entries, alone)), "sequence": list(_sequence(tables, suite.facts, entries)),
        })  # fmt: skip
    return found


def _survivals(
    tables: Mapping[FactKind, Table], facts: FactTasks, entries: Sequence[Sequence[Scores]], alone: Sequence[Sequence[Scores]]
) -> Iterator[dict[str, Any]]:
    """One entry a configuration that has the edit alone: what the configurations with this edit, and those without any, still know."""
    for reference in alone:
        rows = {
            entry[0].configuration.name: kept
            for entry in entries
            if entry is not reference
            and _belongs(entry, reference, alone, facts)
            and (kept := _kept(tables, reference[0].configuration, entry[0].configuration))
        }
        without = [
            e[0].configuration.name for e in entries if not _edited(e[0].configuration, facts) and e[0].configuration.name in rows
        ]
        if len(without) < len(rows):  # something holds the edit
            yield {"alone": reference[0].configuration.name, "rows": rows, "without": without}


def _all_alone(entries: Sequence[Sequence[Scores]], facts: FactTasks) -> list[Sequence[Scores]]:
    """The configurations that have the edit alone: of all that it teaches, and of as few other facts as there are."""
    alone = [entry for entry in entries if _alone(entry, facts)]
    most = max((_taken(entry[0].configuration) for entry in alone), default=0)
    alone = [entry for entry in alone if _taken(entry[0].configuration) == most]  # checkpoints are no edits of their own
    fewest = min((len(entry[0].configuration.edits) for entry in alone), default=0)
    return [entry for entry in alone if len(entry[0].configuration.edits) == fewest]


def _sequence(
    tables: Mapping[FactKind, Table], facts: FactTasks, entries: Sequence[Sequence[Scores]]
) -> Iterator[dict[str, Any]]:
    """Scores on the first cohort, the last one and a sample of all facts so far, of the base and of every number of facts taught."""
    total = max(facts.cohorts, default=0)
    for entry in entries:
        c = entry[0].configuration
        n = c.first or total
        if (c.role == "base" or _edited(c, facts)) and n in facts.cohorts:
            cohorts = {name: _on(tables, c, set(ids)) for name, ids in facts.cohorts[n].items()}
            yield {"configuration": c.name, "facts": 0 if c.role == "base" else n, "cohorts": cohorts}


def _on(tables: Mapping[FactKind, Table], c: Configuration, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Scores by kind on the items of some facts."""
    found: dict[str, dict[str, Any]] = {}
    for kind in FOLLOWED:
        table = tables.get(kind)
        rows = [i for i, item in enumerate(table.items) if item["cluster"] in ids] if table else []
        if table is not None and rows and c.digest in table.values:
            values = table.values[c.digest][rows]
            low, high = score_interval(values, codes(table.cluster[rows].tolist()))
            found[kind] = {"value": float(values.mean()), "low": low, "high": high, "n": len(rows)}
    return found


def _alone(entry: Sequence[Scores], facts: FactTasks) -> bool:
    """Return whether a configuration is an edit for these facts and nothing else: an edit brick on the base, under whatever name, or edits
    without a merge."""
    c = entry[0].configuration
    return _edited(c, facts) and c.role != "average" and ("brick" in roles_of(entry) or not c.parents)


def _taken(c: Configuration) -> float:
    """How many facts of the file the edit has taken, as far as it does not take all."""
    return c.first or math.inf


def _edited(c: Configuration, facts: FactTasks) -> bool:
    return facts.digest in c.edits if facts.digest else bool(c.edits)


def _belongs(entry: Sequence[Scores], reference: Sequence[Scores], alone: Sequence[Sequence[Scores]], facts: FactTasks) -> bool:
    """Whether a configuration is made with the reference's edit, or with none: a control."""
    c = entry[0].configuration
    if not _edited(c, facts):
        return True
    if any(entry is other for other in alone) or _taken(c) < _taken(reference[0].configuration):
        return False
    mine = [other for other in alone if _names(other) & {*c.parents, *(f"{name}-edited" for name in _names(entry))}]
    return any(other is reference for other in mine) if mine else len(alone) == 1


def _names(entry: Sequence[Scores]) -> set[str]:
    return {name for scores in entry for name in scores.names}


def _kept(tables: Mapping[FactKind, Table], alone: Configuration, c: Configuration) -> dict[str, dict[str, Any]]:
    """By kind: of the items that `alone` answers right, the number and share that `c` answers right; Wilson's interval over facts."""
    found: dict[str, dict[str, Any]] = {}
    for kind in SURVIVING:
        table = tables.get(kind)
        if table is None or not {alone.digest, c.digest} <= set(table.values):
            continue
        right = np.flatnonzero(table.values[alone.digest] == 1)
        values = table.values[c.digest][right]
        share: dict[str, Any] = {"value": None, "low": None, "high": None}
        if right.size:
            low, high = score_interval(values, codes(table.cluster[right].tolist()))
            share = {"value": float(values.mean()), "low": low, "high": high}
        found[kind] = {"kept": int(values.sum()), "of": int(right.size), **share}
    return found
