"""Routed configurations: which bricks answered the items of each task, and how they do beside the best merge.

A routed model leaves an item to its task's own brick (or a merge that the brick is part of), to the base, or to another brick. The
last is false routing. On a task that no brick owns, such as retention, the base is right and every brick is false routing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from workbench.compare.families import excluded
from workbench.compare.leaders import pair_of
from workbench.compare.tables import Table
from workbench.ground.numbers import signed
from workbench.ground.results import JsonObject, Number
from workbench.scores.statistics import FEW_CLUSTERS, score_interval
from workbench.scores.store import Configuration, Scores

BASE = "base"
"""Label of items that no brick answered, in the rows of the score store."""


class Share(JsonObject):
    """A share of items with its 95 % interval."""

    value: Number
    """Share from 0 to 1."""
    low: Number
    """Lower end of the interval."""
    high: Number
    """Upper end of the interval."""


class RoutedTask(JsonObject):
    """The bricks that answered the items of a task in a routed configuration."""

    configuration: str
    """Name of the configuration."""
    task: str
    """Name of the task."""
    owner: str | None
    """The configuration's brick that teaches the task; null if the base should answer."""
    n: int
    """Number of items."""
    answered_by: dict[str, int]
    """Bricks, or "base" -> number of items, the most frequent first."""
    own: Share
    """Items that the task's own brick answered."""
    base: Share
    """Items that the base answered."""
    other: Share
    """Items that another brick answered: false routing."""


class RoutedBeside(JsonObject):
    """A routed configuration beside the merge of its bricks with the best mean over skills."""

    configuration: str
    """Name of the routed configuration."""
    merge: str
    """Name of the merge."""
    merges: int
    """Number of merges that it was chosen among."""
    value: Number
    """Mean chance-corrected score of the routed configuration over skills."""
    merge_value: Number
    """The same of the merge."""
    diff: Number
    """Difference of the two, routed minus merge."""
    low: Number
    """Lower end of its 95 % interval."""
    high: Number
    """Upper end of its 95 % interval."""
    verdict: str
    """"better", "worse", "equivalent", "cannot tell" or "no item changed", of the routed configuration."""
    bricks: int
    """Number of bricks that the routed configuration keeps."""
    seconds: Number
    """Time that scoring the routed configuration took."""
    merge_seconds: Number
    """Time that scoring the merge took."""


class RoutingComparison(JsonObject):
    """Routed configurations in a comparison."""

    tasks: list[RoutedTask]
    """One entry for each routed configuration and each task."""
    beside: list[RoutedBeside]
    """One entry for each routed configuration that stands beside a merge of its bricks."""


def routing_of(tasks: Sequence[Table], entries: Sequence[Sequence[Scores]]) -> RoutingComparison | None:
    """Return who answered in routed configurations, and how they do beside the best merge; None if no configuration is routed.

    Args:
        tasks: Tables of all tasks.
        entries: Scores of each configuration over all suites, as returned by `configurations_of`.
    """
    answered = [row for entry in entries for row in _answered(tasks, entry[0].configuration)]
    if not answered:
        return None
    names = {row.configuration for row in answered}
    return RoutingComparison(tasks=answered, beside=list(_beside(tasks, entries, names)))


def _answered(tasks: Sequence[Table], c: Configuration) -> Iterator[RoutedTask]:
    """Yield for each task the bricks that answered, and the shares of its own brick, the base and other bricks."""
    for table in tasks:
        rows = table.rows.get(c.digest, ())
        labels = [list(row.get("routed") or ()) for row in rows]
        if not labels or not all(labels):
            continue
        owner = table.suite.owners.get(table.task)
        owner = owner if owner in c.parents else None
        # A routed merge that the owner is part of is the owner's too.
        own = set() if owner is None else {owner, *(name for name, members in c.members.items() if owner in members)}
        counts = Counter(" and ".join(label) for label in labels)
        yield RoutedTask(
            configuration=c.name,
            task=table.name,
            owner=owner,
            n=len(labels),
            answered_by=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            own=_share(table, [bool(own) and set(label) <= own for label in labels]),
            base=_share(table, [set(label) == {BASE} for label in labels]),
            other=_share(table, [bool(set(label) - own - {BASE}) for label in labels]),
        )


def _share(table: Table, chosen: Sequence[bool]) -> Share:
    """Return a share of a task's items with its 95 % interval."""
    values = np.array(chosen, np.float64)
    low, high = score_interval(values, table.cluster)
    return Share(value=float(values.mean()), low=low, high=high)


def _beside(tasks: Sequence[Table], entries: Sequence[Sequence[Scores]], routed: set[str]) -> Iterator[RoutedBeside]:
    """Yield each routed configuration with the merge that has the best mean over skills.

    The merge is chosen on the items of the comparison, which favors it: a routed model that is still better is better than every merge.
    """
    by_name = {entry[0].configuration.name: entry for entry in entries}
    for name in sorted(routed):
        c = by_name[name][0].configuration
        skills = [t for t in tasks if t.skill and c.digest in t.values]
        merges = {
            other: entry[0].configuration.digest
            for other, entry in by_name.items()
            if other not in routed and _is_merge(entry, c, skills)
        }
        if not skills or not merges:
            continue
        best = max(merges, key=lambda other: _mean(skills, merges[other]))
        diff, low, high, verdict = _difference(skills, c.digest, merges[best])
        yield RoutedBeside(
            configuration=name,
            merge=best,
            merges=len(merges),
            value=_mean(skills, c.digest),
            merge_value=_mean(skills, merges[best]),
            diff=diff,
            low=low,
            high=high,
            verdict=verdict,
            bricks=len(c.bricks or c.parents),
            seconds=sum(s.seconds for s in by_name[name]),
            merge_seconds=sum(s.seconds for s in by_name[best]),
        )


def _difference(skills: Sequence[Table], routed: str, merge: str) -> tuple[float, float, float, str]:
    """Return the difference of the means over skills, the ends of its 95 % interval, and a verdict."""
    pair, drawn = (pair_of(skills, routed, merge, drawn=drawn) for drawn in (False, True))
    low, high = pair.interval(0.05)
    margin = float(np.mean([(t.min_effect or 0.0) / t.span for t in skills]))
    verdict = "no item changed" if pair.unchanged else "cannot tell"
    if min(t.clusters for t in skills) >= FEW_CLUSTERS:
        if low > 0 or high < 0:
            verdict = "better" if low > 0 else "worse"
        elif excluded(drawn, (low, high), margin, 0.025):
            verdict = "equivalent"
    return pair.diff, low, high, verdict


def _is_merge(entry: Sequence[Scores], routed: Configuration, skills: Sequence[Table]) -> bool:
    """Return True if a configuration combines two or more bricks, among them bricks of the routed one, and has scores on all skills."""
    c = entry[0].configuration
    combined = c.role in ("configuration", "average") and len(c.parents) > 1 and set(c.parents) & set(routed.parents)
    return bool(combined) and all(c.digest in t.values for t in skills)


def _mean(skills: Sequence[Table], digest: str) -> float:
    """Return the mean chance-corrected score over skills."""
    return float(np.mean([t.corrected(t.values[digest].mean()) for t in skills]))


def advice(row: RoutedBeside, kept: float | None = None) -> str:
    """Return a sentence that says whether to merge or to route, with its reason.

    Args:
        row: An entry of `beside`.
        kept: Share of the skills of the best single bricks that the routed configuration keeps, if known.
    """
    routed, merge = row.configuration, row.merge
    which = f"{merge}, the best of {row.merges} merges" if row.merges > 1 else f"{merge}, the only merge"
    diff, low, high = (signed(100 * value, 1) for value in (row.diff, row.low, row.high))
    gap = f"{diff} [{low}, {high}] points"
    oracle = f" and keeps {100 * kept:.0f} % of the single bricks' skills" if kept is not None else ""
    price = f"it needs its {row.bricks} adapters beside the base and a routing pass for each prompt"
    if row.verdict == "better":
        return f"Route: {routed} scores {gap} above {which}{oracle}; {price}."
    if row.verdict == "worse":
        return f"Merge: {routed} scores {gap} against {which}, which is one model without a router."
    if row.verdict in ("equivalent", "no item changed"):
        return f"Merge: {routed} and {which}, are equivalent ({gap}), and the merge is one model without a router."
    return (
        f"Merge or route cannot be told: {routed} scores {gap} against {which}; more clusters of items would help, and {price}."
    )
