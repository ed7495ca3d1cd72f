"""What a reader should know before believing a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from workbench.compare.tables import Table, roles_of
from workbench.errors import nearest
from workbench.facts.kinds import ACCURACIES
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS, effective_clusters
from workbench.scores.store import Scores
from workbench.scores.suite import Suite, metric_of

_SMALL = 100  # items below which a task is called small
_MANY_TASKS = 20  # tasks of one family above which each costs the others much


def warnings_of(
    scores: Sequence[Scores],
    suites: Mapping[str, Suite],
    tasks: Sequence[Table],
    entries: Sequence[Sequence[Scores]],
    names: Sequence[str],
    family: Mapping[str, Any],
) -> Iterable[str]:
    """What a reader should know before believing a row."""
    if any(s.partial for s in scores):
        yield "Partial: items were cut by --limit; these scores are for a quick look only."
    for t in tasks:
        yield from _clusters(t)
        if len(t.items) < _SMALL and t.share and not t.contrast:
            yield f"{t.name}: {len(t.items)} items; if one in ten changes, a difference below {0.9 / math.sqrt(len(t.items)):.0%} can stay hidden."
        if t.chance is None and t.suite.role_of(t.name) != "other":
            known = metric_of(t.metric) in ACCURACIES
            why = "its items do not tell a score of guessing" if known else f"no score of guessing is known for '{t.metric}'"
            yield f"{t.name}: not corrected for chance: {why}, and the suite gives no `chance` for it."
        if t.contrast:
            asked = max(len(other.items) for other in tasks if other.name in (t.contrast.of, t.contrast.minus))
            if len(t.items) < asked:
                yield f"{t.name}: {len(t.items)} of {asked} items have a partner in the other task; the rest is left out."
    if len(suites) > 1:
        yield f"{len(suites)} suites are compared together: the family and its correction span all of them."
    if len({s.device for s in scores}) > 1:
        yield "Scored on different devices: small differences may come from rounding."
    if family["correction"] == "none" and family["size"] > 1:
        yield (
            f"{family['size']} comparisons at {family['alpha']:g} each, without correction: about {family['size'] * family['alpha']:.2g} "
            "better or worse are expected where nothing differs."
        )
    elif len(compared := [t for t in tasks if not t.guarded]) > _MANY_TASKS and family["size"]:
        yield (
            f"{len(compared)} tasks and contrasts in one family: each of them makes the others harder to tell; drop tasks that nobody asks about. "
            "More configurations on the same items cost little."
        )
    shown = {n for e in entries for s in e for n in s.names}
    roles = {role for entry in entries for role in roles_of(entry)}
    parents = dict.fromkeys(p for e in entries if e[0].configuration.role == "configuration" for p in e[0].configuration.parents)
    missing = [p for p in parents if p not in shown]
    made = (e[0].configuration for e in entries if e[0].configuration.role == "configuration")
    if "base" not in roles and any(c.recipe or c.parents for c in made):  # models and imported runs have no base of their own
        missing.insert(0, "base")
    if len(parents) > 1 and "average" not in roles:
        missing.append("average")
    if missing:
        yield f"Missing controls: {', '.join(missing)}. A merge is judged against its base, each parent and their average."
    for t in tasks:
        owner = t.suite.owners.get(t.name)
        if owner is not None and owner not in shown and parents:
            yield f"{t.name}: its owner '{owner}' is not among the scored configurations. {nearest(owner, names)}"
        absent = [e[0].configuration.name for e in entries if e[0].configuration.digest not in t.values]
        if absent:
            yield f"{t.name}: not scored for {', '.join(absent)}."


def _clusters(t: Table) -> Iterable[str]:
    """Yield what a task's clusters limit: their number, or sizes so unequal that they are worth few."""
    sizes = np.bincount(t.cluster)
    k, worth = sizes.size, effective_clusters(sizes)
    if k < FEW_CLUSTERS:
        yield f"{t.name}: {k} clusters; below {FEW_CLUSTERS} no verdict is given."
    elif worth < FEW_CLUSTERS:
        yield (
            f"{t.name}: {k} clusters of unequal size are worth {worth:.1f} equal ones (the largest holds {sizes.max() / sizes.sum():.0%} of the items); "
            "what the large ones show decides nearly everything."
        )
    elif k < MANY_CLUSTERS:
        yield f"{t.name}: {k} clusters; tests by sign flips find only large differences, larger ones with every further task of the family."
