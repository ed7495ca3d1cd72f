"""Typed objects with everything that a search's page shows; `reading` builds them from the search's document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.compare.comparison import Comparison
from workbench.report.numbers import MINUS, POINTS, Unit


@dataclass(frozen=True)
class ObjectiveView:
    """An objective of the search; `index` is its position in lists of scores."""

    name: str
    index: int
    lower: bool
    unit: Unit
    terms: tuple[str, ...] = ()
    test_items: int | None = None
    """Test items of the objective's tasks; the test also covers other tasks of the suites."""

    def better(self, a: float, b: float) -> bool:
        """Return True if score `a` is better than score `b`."""
        return a < b if self.lower else a > b

    @property
    def direction(self) -> str:
        """The better direction in words."""
        return "lower is better" if self.lower else "higher is better"

    @property
    def measure(self) -> str:
        """Name and unit, for axes and headings."""
        word = "%" if self.unit == POINTS else self.unit.word
        return f"{self.name}, {word}" if word else self.name


@dataclass(frozen=True)
class DimensionView:
    """A dimension of the search: a list of choices, or a range of numbers."""

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    @property
    def numeric(self) -> bool:
        """True for a range of numbers."""
        return not self.choices


@dataclass(frozen=True)
class Candidate:
    """A finished candidate.

    Attributes:
        arm: "search" (drawn by the sampler) or "random".
        number: Number within its arm, from 0.
        values: Value by dimension, without dimensions that its method does not have.
        scores: One per objective; estimates if it was stopped early; None if it failed.
        stopped: It was stopped before it was scored on all items.
        items: Number of items on which it was scored.
        beaten_by: Name of the configuration that beat it when it was stopped.
        error: Error message if it failed.
        intervals: One per objective if it was scored on all items: the best control's score plus the 95 % interval of the paired difference.
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
    intervals: tuple[tuple[float, float] | None, ...] = ()

    @property
    def failed(self) -> bool:
        """True if the candidate could not be scored."""
        return self.scores is None

    @property
    def complete(self) -> bool:
        """True if the candidate was scored on all search items."""
        return self.scores is not None and not self.stopped

    @property
    def random(self) -> bool:
        """True if the candidate was drawn at random."""
        return self.arm == "random"

    def interval(self, objective: ObjectiveView) -> tuple[float, float] | None:
        """Return the interval under one objective, or None."""
        return self.intervals[objective.index] if objective.index < len(self.intervals) else None


@dataclass(frozen=True)
class Control:
    """Scores on all search items of a configuration that needs no search."""

    name: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Unbeaten:
    """A configuration that no candidate beats, in a search whose candidates were all stopped early.

    Attributes:
        role: base, brick, average, configuration, or random.
        search: Scores on search items, one per objective.
        test: Scores on test items, one per objective.
    """

    name: str
    role: str
    search: tuple[float | None, ...]
    test: tuple[float | None, ...]


@dataclass(frozen=True)
class Against:
    """A tested candidate's paired difference from the best control under one objective; positive is better for every metric.

    Attributes:
        diff: Difference on test items.
        low: Lower end of its unadjusted 95 % interval.
        high: Upper end of that interval.
        search: Difference on search items.
        optimism: `search` minus `diff`.
        reason: Reason of the verdict "cannot tell".
    """

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
    """A configuration that was scored on search and test items.

    Attributes:
        kind: control, candidate, or random.
        optimism: Difference from the best control on search items minus that on test items, one per objective.
        against: Paired differences from the best control, one per objective; None for controls.
        twin: Name of a control with the same weights.
    """

    name: str
    kind: str
    search: tuple[float | None, ...]
    test: tuple[float | None, ...]
    optimism: tuple[float | None, ...]
    against: tuple[Against | None, ...]
    twin: str | None = None


@dataclass(frozen=True)
class Progress:
    """The progress of a search that is not finished.

    Attributes:
        done: Number of finished candidates.
        total: Number of candidates of the whole search; None if only time limits them.
    """

    done: int
    total: int | None


@dataclass(frozen=True)
class SearchView:
    """Everything that the page shows; `comparison` holds the differences on test items by task."""

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
    comparison: Comparison | None
    command: str
    unbeaten: tuple[Unbeaten, ...] = ()
    notes: tuple[str, ...] = ()
    """Warnings of the search itself."""
    progress: Progress | None = None
    """None if the search is finished."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the search, then those of its comparison."""
        return (*self.notes, *(self.comparison.warnings if self.comparison else ()))

    @property
    def searched(self) -> tuple[Candidate, ...]:
        """Candidates drawn by the sampler."""
        return tuple(c for c in self.candidates if not c.random)

    @property
    def drawn(self) -> tuple[Candidate, ...]:
        """Candidates drawn at random."""
        return tuple(c for c in self.candidates if c.random)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The winner, or the Pareto front if there are several objectives."""
        return (self.winner,) if self.winner else self.front

    def row(self, name: str | None, *kinds: str) -> TestedView | None:
        """Return the tested configuration of a name; `kinds` separates a control from a candidate of the same name."""
        return next((t for t in self.tested if t.name == name and (not kinds or t.kind in kinds)), None)


def number(value: Any) -> float | None:
    """Return a dimension's value as a number, or None if it is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def written(value: Any) -> str:
    """Format a dimension's value as in recipes, with a typographic minus sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.6g}".replace("-", MINUS)
    return str(value)
