"""Configurations that were scored on the same items before and are not named in a comparison.

Who scores twenty equal configurations and then names the best one finds it "better" in one of four cases. A family is therefore what was
looked at, not what was named: the differences of all that the score store holds under the plans of a comparison are tested together with
those that it shows. They are read, never scored. Equal or similar ones cost little power (max-T).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from workbench.compare.advice import CANDIDATES
from workbench.compare.tables import Table, tables_of
from workbench.errors import WorkbenchError
from workbench.scores.documents import read_document
from workbench.scores.statistics import Floats
from workbench.scores.store import Configuration, Scores, ScoreStore
from workbench.scores.suite import Suite


@dataclass(frozen=True)
class LookedAt:
    """What was scored on the same items beside a comparison.

    Attributes:
        tables: Tables of the comparison with the scores of these configurations added.
        configurations: The configurations. Each is named by its digest, because an edited recipe keeps its name.
        warnings: Why scores of a configuration cannot be read and do not count, one text each.
    """

    tables: Sequence[Table]
    configurations: Sequence[Configuration] = ()
    warnings: Sequence[str] = ()


def looked_at(store: ScoreStore, scores: Sequence[Scores], tasks: Sequence[Table], suites: Mapping[str, Suite]) -> LookedAt:
    """Return the other candidates that the store holds under the plans of some scores.

    Scores of another plan do not count, because their items, settings or scorer are others, and neither do controls that nobody would ship.

    Args:
        store: The store.
        scores: Scores of the comparison.
        tasks: Tables of these scores.
        suites: Suites by name, with the settings of the comparison.
    """
    shown = {s.key for s in scores} | {s.configuration.digest for s in scores}
    found: dict[str, list[Scores]] = {}
    unread: list[str] = []
    for suite, plan in dict.fromkeys((s.suite, s.plan) for s in scores):
        for path in sorted(store.folder(suite, plan).glob("*.json")):
            if path.name == "plan.json":
                continue
            try:
                other = read_document(path)
            except WorkbenchError as error:
                unread.append(str(error))
                continue
            c, roles = other.configuration, {other.configuration.role, *(alias.role for alias in other.aliases)}
            if other.plan == plan and other.rows and roles & {*CANDIDATES} and not {other.key, c.digest} & shown:
                found.setdefault(c.digest, []).append(other)
    added: dict[tuple[str, str], dict[str, Floats]] = {(t.suite.suite, t.task): {} for t in tasks}
    for read in _read(store, list(found.values()), suites, unread):
        for t in tasks:
            same = read.get((t.suite.suite, t.task), t)
            if t.weights is None or (same.weights is not None and np.array_equal(t.weights, same.weights)):
                values = {d: x for d, x in same.values.items() if d not in t.values and (not t.share or _within(x, t))}
                added[t.suite.suite, t.task].update(values)
    tables = [replace(t, values={**t.values, **added[t.suite.suite, t.task]}) for t in tasks]
    counted = {digest for values in added.values() for digest in values}
    return LookedAt(
        tables,
        [replace(own[0].configuration, name=digest) for digest, own in found.items() if digest in counted],
        [f"Not counted, although it may have been looked at: {reason}" for reason in unread],
    )


def _read(
    store: ScoreStore, found: Sequence[list[Scores]], suites: Mapping[str, Suite], unread: list[str]
) -> Iterator[dict[tuple[str, str], Table]]:
    """Yield the tables of some configurations by suite and name: of all together, or one by one if some cannot be read."""
    if not found:
        return
    scores = [s for own in found for s in own]
    try:
        tables = tables_of(store, scores, {s.suite: suites[s.suite] for s in scores})
    except WorkbenchError as error:
        if len(found) == 1:
            unread.append(str(error))
        else:
            for own in found:
                yield from _read(store, [own], suites, unread)
    else:
        yield {(t.suite.suite, t.task): t for t in tables}


def _within(values: Floats, t: Table) -> bool:
    """Return True if scores lie in the range of the task's shown scores, in whose units all differences are."""
    return bool(values.min() >= (-1 if t.contrast else 0) and values.max() <= 1)
