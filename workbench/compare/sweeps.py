"""Sweeps: mean over skills and retention of the points of a sweep, with intervals, and seeds averaged.

Every point is a configuration like any other, and the comparison's families hold it. What is computed here is descriptive: the levels
that a report draws as curves against a swept number.

If a sweep varies a seed, the scores of the other values are averaged over the seeds. The interval of such a mean knows both sources of
error. With S seeds, m_s the measure under seed s, and V_items the clustered variance of the mean over items of each item's average over seeds:

    V = V_items + V_seeds,   V_seeds = sum over s of (m_s - mean)^2 / (S - 1) / S
    mean +- t(nu) sqrt(V),   nu = V^2 / (V_items^2 / (k - 1) + V_seeds^2 / (S - 1))

k is the effective number of clusters, and nu is Satterthwaite's. What seed and item do together is in both variances, so the interval is
somewhat too wide rather than too narrow (Cameron, Gelbach and Miller 2011, who subtract it, which can make a variance negative).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.compare.configurations import mean_score
from workbench.compare.tables import Table
from workbench.scores.signflips import TINY
from workbench.scores.statistics import clustered_se, effective_clusters, score_interval, upper_t
from workbench.scores.store import Configuration, Scores

Value = bool | int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class SweepDimension:
    """A field that a sweep varies.

    Attributes:
        name: Name of the field, such as "mix.lambda".
        label: Short name, as in the names of the points.
        values: Its values, in the order of the recipe.
    """

    name: str
    label: str
    values: tuple[Value, ...]

    @property
    def seed(self) -> bool:
        """True if the field is a seed, over which scores are averaged."""
        return self.name.rpartition(".")[2] == "seed"

    @property
    def number(self) -> bool:
        """True if every value has a place on an axis: a number, or for a list of bricks their number."""
        places = [place_of(value) for value in self.values]
        return None not in places and len(set(places)) == len(places)


@dataclass(frozen=True)
class SweepPoint:
    """A configuration of a sweep.

    Attributes:
        name: Name of the configuration.
        values: Its values by the name of the field. A field that the point's method does not have is missing.
        text: The point as a recipe.
    """

    name: str
    values: Mapping[str, Value]
    text: str


@dataclass(frozen=True)
class Sweep:
    """A recipe that stands for many configurations.

    Attributes:
        name: Name of the recipe.
        dimensions: The fields that it varies.
        points: Its configurations.
    """

    name: str
    dimensions: tuple[SweepDimension, ...]
    points: tuple[SweepPoint, ...]


def place_of(value: Value | Sequence[str]) -> float | None:
    """Return the place of a value on an axis: a number itself, the number of bricks in a list; None for a word."""
    if isinstance(value, (list, tuple)):
        return float(len(value))
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class _Measure:
    """A level that is drawn: a mean of tasks, or the metric of a single task."""

    key: str
    text: str
    tables: tuple[Table, ...]
    corrected: bool

    def document(self, base: Configuration) -> dict[str, Any]:
        """Return the entry of the document, with the baseline's level."""
        scored = all(base.digest in t.values for t in self.tables)
        return {
            "key": self.key,
            "text": self.text,
            "share": all(t.share for t in self.tables),
            "lower": self.tables[0].lower,
            "baseline": self.level(base.digest) if scored else None,
        }

    def level(self, digest: str) -> float:
        """Return the level of a configuration."""
        if not self.corrected:
            return self.tables[0].value(digest)
        return float(np.mean([t.corrected(t.value(digest)) for t in self.tables]))

    def estimate(self, digests: Sequence[str]) -> dict[str, Any] | None:
        """Return the mean over seeds with its interval; None if a configuration lacks scores on one of the tasks.

        Args:
            digests: Digest of the configuration of each seed.
        """
        if not all(d in t.values for t in self.tables for d in digests):
            return None
        if len(digests) == 1:
            if self.corrected:
                return {**(mean_score(self.tables, digests[0]) or {}), "between": None}
            low, high = self.tables[0].interval(digests[0])
            return {"value": self.level(digests[0]), "low": low, "high": high, "between": None}
        return self._over_seeds(digests)

    def _over_seeds(self, digests: Sequence[str]) -> dict[str, Any]:
        levels = np.array([self.level(d) for d in digests])
        items, df_items = self._item_variance(digests)
        between = float(levels.var(ddof=1))
        seeds, df_seeds = between / len(levels), len(levels) - 1
        total, value = items + seeds, float(levels.mean())
        if not math.isfinite(total):
            low, high = -math.inf, math.inf
        elif total <= TINY**2:
            low = high = value
        else:
            df = total**2 / (items**2 / df_items + seeds**2 / df_seeds)
            half = upper_t(0.025, df) * math.sqrt(total)
            low, high = value - half, value + half
        return {"value": value, "low": low, "high": high, "between": math.sqrt(between)}

    def _item_variance(self, digests: Sequence[str]) -> tuple[float, float]:
        """Return the variance of the level that comes from the items, and its degrees of freedom."""
        if (
            first := self.tables[0]
        ).ratio is not None:  # a ratio has no score per item; a mean varies no more than one of its parts
            ends = [first.interval(d) for d in digests]
            df = max(effective_clusters(np.bincount(first.cluster)) - 1, 1.0)
            return float(np.mean([((high - low) / 2 / upper_t(0.025, df)) ** 2 for low, high in ends])), df
        variance, df = 0.0, math.inf
        for t in self.tables:
            average = np.mean([t.values[d] for d in digests], axis=0)
            own, se = max(t.effective - 1, 1.0), clustered_se(average, t.cluster)
            if se <= TINY:  # equal items show no spread: take the width of a single score's interval
                low, high = score_interval(average, t.cluster)
                se = (high - low) / 2 / upper_t(0.025, own)
            variance, df = variance + (se / (t.span if self.corrected else 1.0)) ** 2, min(df, own)
        return variance / len(self.tables) ** 2, df


def sweeps_of(
    sweeps: Iterable[Sweep], tasks: Sequence[Table], base: Configuration, entries: Sequence[Sequence[Scores]]
) -> dict[str, Any]:
    """Return the document's entry `sweeps`; empty if no sweep is compared.

    Args:
        sweeps: The sweeps.
        tasks: Tables of all tasks.
        base: The baseline.
        entries: Scores of each configuration over all suites, every name shown.
    """
    digests = {entry[0].configuration.name: entry[0].configuration.digest for entry in entries}
    measures = _measures(tasks)
    found = [_document(sweep, measures, base, digests) for sweep in sweeps]
    found = [one for one in found if one["points"]]
    return {"sweeps": found} if found else {}


def _measures(tasks: Sequence[Table]) -> list[_Measure]:
    """Return the mean over skills, and retention: one task's own metric, or the mean of several."""
    measures = []
    if skills := tuple(t for t in tasks if t.skill):
        measures.append(_Measure("mean", "mean over skills", skills, True))
    retention = tuple(t for t in tasks if t.suite.role_of(t.task) == "retention" and t.contrast is None)
    several = tuple(t for t in retention if t.correctable)
    if len(several) > 1:
        measures.append(_Measure("retention", "retention: mean of " + ", ".join(t.name for t in several), several, True))
    elif one := (several or retention)[:1]:
        measures.append(_Measure("retention", f"retention: {one[0].name}", one, False))
    return measures


def _document(sweep: Sweep, measures: Sequence[_Measure], base: Configuration, digests: Mapping[str, str]) -> dict[str, Any]:
    seeds = {d.name for d in sweep.dimensions if d.seed}
    groups: dict[tuple[tuple[str, Value], ...], list[SweepPoint]] = {}
    for point in sweep.points:
        if point.name in digests:
            groups.setdefault(tuple((k, v) for k, v in point.values.items() if k not in seeds), []).append(point)
    return {
        "name": sweep.name,
        "dimensions": [
            {"name": d.name, "label": d.label, "values": [_plain(v) for v in d.values], "number": d.number, "seed": d.seed}
            for d in sweep.dimensions
        ],
        "measures": [m.document(base) for m in measures],
        "points": [
            {
                "values": {k: _plain(v) for k, v in values},
                "configurations": [p.name for p in points],
                "levels": {m.key: m.estimate([digests[p.name] for p in points]) for m in measures},
            }
            for values, points in groups.items()
        ],
        "missing": [p.name for p in sweep.points if p.name not in digests],
    }


def _plain(value: Value) -> Any:
    return list(value) if isinstance(value, tuple) else value
