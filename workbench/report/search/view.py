"""What the page of a search shows, as typed objects; `reading` makes them of the search's document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.report.numbers import MINUS, POINTS, Unit
from workbench.report.view import View


@dataclass(frozen=True)
class ObjectiveView:
    """What was to be best; `index` is its place in lists of scores."""

    name: str
    index: int
    lower: bool
    unit: Unit
    terms: tuple[str, ...] = ()
    test_items: int | None = None
    """Items of its tasks that no candidate saw; a search tests on other tasks of its suites too."""

    def better(self, a: float, b: float) -> bool:
        """Whether score `a` is better than `b`."""
        return a < b if self.lower else a > b

    @property
    def direction(self) -> str:
        return "less is better" if self.lower else "more is better"

    @property
    def measure(self) -> str:
        """Name and unit, as axes and headings call it."""
        word = "%" if self.unit == POINTS else self.unit.word
        return f"{self.name}, {word}" if word else self.name


@dataclass(frozen=True)
class DimensionView:
    """A field that was searched: one of some choices, or a number between two ends."""

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    @property
    def numeric(self) -> bool:
        return not self.choices


@dataclass(frozen=True)
class Candidate:
    """A candidate that is done.

    Attributes:
        arm: search, or random.
        number: In its arm, from 0.
        values: Dimension -> value; without dimensions that its method does not have.
        scores: One an objective; an estimate where it was given up; None where it failed.
        stopped: Given up before it had seen all items.
        items: How many it has seen.
        beaten_by: Why it was given up.
        error: Why it failed.
        intervals: One an objective, around scores of all items: 95 %, from the paired difference from the best control.
    """

    name: str
    arm: str
    number: int
    values: Mapping[str, Any]
    scores: tuple[float, ...] | None
    stopped: bool
    items: int | None
    beaten_by: str | None
    error: str | None
    seconds: float | None
    digest: str
    intervals: tuple[tuple[float, float] | None, ...] = ()

    @property
    def failed(self) -> bool:
        return self.scores is None

    @property
    def complete(self) -> bool:
        """Whether it has seen all search items."""
        return self.scores is not None and not self.stopped

    @property
    def random(self) -> bool:
        return self.arm == "random"

    def interval(self, objective: ObjectiveView) -> tuple[float, float] | None:
        """Of one objective."""
        return self.intervals[objective.index] if objective.index < len(self.intervals) else None


@dataclass(frozen=True)
class Control:
    """What needs no search, on all search items."""

    name: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Unbeaten:
    """A configuration that no candidate beats, where all of them were given up.

    Attributes:
        role: base, brick, average, configuration, or random.
        search, test: Scores, one an objective.
    """

    name: str
    role: str
    search: tuple[float | None, ...]
    test: tuple[float | None, ...]


@dataclass(frozen=True)
class Against:
    """A tested candidate minus the best control under one objective, paired by item; above zero is better, whatever the metric.

    Attributes:
        diff, low, high: On test items, with a plain 95 % interval.
        search: The difference on search items.
        optimism: By how much that is larger.
        reason: Why it cannot tell.
    """

    objective: str
    diff: float | None
    low: float | None
    high: float | None
    clusters: int | None
    verdict: str | None
    search: float | None
    optimism: float | None
    reason: str | None = None


@dataclass(frozen=True)
class TestedView:
    """A configuration on search and test items.

    Attributes:
        kind: control, candidate, or random.
        optimism: By how much its difference from the best control is larger on search items, one an objective.
        against: One an objective; of a control none.
        twin: The control whose weights it has.
    """

    name: str
    kind: str
    digest: str
    search: tuple[float | None, ...]
    test: tuple[float | None, ...]
    optimism: tuple[float | None, ...]
    against: tuple[Against | None, ...]
    twin: str | None = None


@dataclass(frozen=True)
class SearchView:
    """Everything that the page shows. `comparison` is the comparison on test items, task by task."""

    name: str
    key: str
    directory: str
    sampler: str
    seed: int | None
    objectives: tuple[ObjectiveView, ...]
    dimensions: tuple[DimensionView, ...]
    search_items: int | None
    test_items: int | None
    stages: tuple[int, ...]
    controls: tuple[Control, ...]
    candidates: tuple[Candidate, ...]
    importances: Mapping[str, tuple[tuple[str, float], ...]]
    winner: str | None
    front: tuple[str, ...]
    best_control: str | None
    recipes: Mapping[str, str]
    tested: tuple[TestedView, ...]
    hypervolume: tuple[float, ...]
    comparison: View | None
    command: str
    unbeaten: tuple[Unbeaten, ...] = ()
    notes: tuple[str, ...] = ()
    """Warnings of the search itself."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """The search's, then those of its comparison."""
        return (*self.notes, *(self.comparison.warnings if self.comparison else ()))

    @property
    def searched(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if not c.random)

    @property
    def drawn(self) -> tuple[Candidate, ...]:
        """Candidates of the random arm."""
        return tuple(c for c in self.candidates if c.random)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The winner, or the front of several objectives."""
        return (self.winner,) if self.winner else self.front

    def row(self, name: str | None, *kinds: str) -> TestedView | None:
        """What was tested under a name; `kinds` tells a control from a candidate of the same name."""
        return next((t for t in self.tested if t.name == name and (not kinds or t.kind in kinds)), None)


def number(value: Any) -> float | None:
    """A dimension's value as a number; None where it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def written(value: Any) -> str:
    """A dimension's value as recipes write it, with a true minus sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.6g}".replace("-", MINUS)
    return str(value)
