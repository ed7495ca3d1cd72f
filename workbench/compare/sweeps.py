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

import numpy as np

from workbench.compare.configurations import mean_score
from workbench.compare.swept import Sweep, SweepPoint, Value
from workbench.compare.tables import Table
from workbench.ground.results import JsonObject, Measured, Number
from workbench.scores.signflips import TINY
from workbench.scores.statistics import clustered_se, effective_clusters, score_interval, upper_t
from workbench.scores.store import Configuration, Scores

Plain = bool | int | float | str | list[str]


class SweptField(JsonObject):
    """A field that a sweep varies."""

    name: str
    """Name of the field, such as "mix.lambda"."""
    label: str
    """Short name in tables and charts."""
    values: list[Plain]
    """The values in the order of the recipe."""
    number: bool
    """Whether the values have places on an axis: numbers, or lists of different numbers of bricks."""
    seed: bool
    """Whether the field is a seed, over which scores are averaged."""


class SweepMeasure(JsonObject):
    """A level that is given for each point."""

    key: str
    """"mean" or "retention", the key in `levels`."""
    text: str
    """Description of the level."""
    share: bool
    """Whether the level lies in [0, 1]."""
    lower: bool
    """Whether lower is better."""
    baseline: Number | None
    """The baseline's level; null if the baseline was not scored on all tasks."""


class SweepLevel(JsonObject):
    """A level of a point with its 95 % interval."""

    value: Number
    """The level; with several seeds the mean over them."""
    low: Measured
    """Lower end of the interval; null if it is infinite. With several seeds it covers the spread between seeds and that of items."""
    high: Measured
    """Upper end of the interval."""
    between: Number | None
    """Standard deviation between seeds; null for a single one."""


class SweptPoint(JsonObject):
    """A combination of values, without the seed."""

    values: dict[str, Plain]
    """Field -> value. Fields that the point's method does not have are absent."""
    configurations: list[str]
    """Names of its configurations, one for each seed."""
    levels: dict[str, SweepLevel | None]
    """Key of a measure -> level; null if a configuration was not scored on all tasks."""


class ComparedSweep(JsonObject):
    """A recipe that stands for several configurations."""

    name: str
    """Name of the recipe."""
    dimensions: list[SweptField]
    """The fields that it varies."""
    measures: list[SweepMeasure]
    """Mean over skills and retention, as far as the suites have such tasks."""
    points: list[SweptPoint]
    """The scored combinations of values."""
    missing: list[str]
    """Names of configurations without scores."""


@dataclass(frozen=True)
class _Measure:
    """A level that is drawn: a mean of tasks, or the metric of a single task."""

    key: str
    text: str
    tables: tuple[Table, ...]
    corrected: bool

    def entry(self, base: Configuration) -> SweepMeasure:
        """Return the measure with the baseline's level."""
        scored = all(base.digest in t.values for t in self.tables)
        return SweepMeasure(
            key=self.key,
            text=self.text,
            share=all(t.share for t in self.tables),
            lower=self.tables[0].lower,
            baseline=self.level(base.digest) if scored else None,
        )

    def level(self, digest: str) -> float:
        """Return the level of a configuration."""
        if not self.corrected:
            return self.tables[0].value(digest)
        return float(np.mean([t.corrected(t.value(digest)) for t in self.tables]))

    def estimate(self, digests: Sequence[str]) -> SweepLevel | None:
        """Return the mean over seeds with its interval; None if a configuration lacks scores on one of the tasks.

        Args:
            digests: Digest of the configuration of each seed.
        """
        if not all(d in t.values for t in self.tables for d in digests):
            return None
        if len(digests) == 1:
            if self.corrected and (mean := mean_score(self.tables, digests[0])):
                return SweepLevel(value=mean.value or 0.0, low=mean.low, high=mean.high, between=None)
            low, high = self.tables[0].interval(digests[0])
            return SweepLevel(value=self.level(digests[0]), low=low, high=high, between=None)
        return self._over_seeds(digests)

    def _over_seeds(self, digests: Sequence[str]) -> SweepLevel:
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
        return SweepLevel(value=value, low=low, high=high, between=math.sqrt(between))

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
) -> list[ComparedSweep] | None:
    """Return the levels of the sweeps' points; None if no sweep is compared.

    Args:
        sweeps: The sweeps.
        tasks: Tables of all tasks.
        base: The baseline.
        entries: Scores of each configuration over all suites, every name shown.
    """
    digests = {entry[0].configuration.name: entry[0].configuration.digest for entry in entries}
    measures = _measures(tasks)
    found = [_compared(sweep, measures, base, digests) for sweep in sweeps]
    return [one for one in found if one.points] or None


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


def _compared(sweep: Sweep, measures: Sequence[_Measure], base: Configuration, digests: Mapping[str, str]) -> ComparedSweep:
    seeds = {d.name for d in sweep.dimensions if d.seed}
    groups: dict[tuple[tuple[str, Value], ...], list[SweepPoint]] = {}
    for point in sweep.points:
        if point.name in digests:
            groups.setdefault(tuple((k, v) for k, v in point.values.items() if k not in seeds), []).append(point)
    return ComparedSweep(
        name=sweep.name,
        dimensions=[
            SweptField(name=d.name, label=d.label, values=[_plain(v) for v in d.values], number=d.number, seed=d.seed)
            for d in sweep.dimensions
        ],
        measures=[m.entry(base) for m in measures],
        points=[
            SweptPoint(
                values={k: _plain(v) for k, v in values},
                configurations=[p.name for p in points],
                levels={m.key: m.estimate([digests[p.name] for p in points]) for m in measures},
            )
            for values, points in groups.items()
        ],
        missing=[p.name for p in sweep.points if p.name not in digests],
    )


def _plain(value: Value) -> Plain:
    return list(value) if isinstance(value, tuple) else value
