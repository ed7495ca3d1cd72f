"""A search as its page shows it: the result, with units of the objectives and texts of the dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workbench.compare.comparison import Comparison
from workbench.ground.errors import shell
from workbench.ground.numbers import figures
from workbench.recipe.fields import Choices, Range
from workbench.report.numbers import POINTS, Unit, raw
from workbench.search.result import (
    CandidateVerdict,
    GrowingSearch,
    SearchProgress,
    SearchResult,
    SearchState,
    TestedPart,
    TestedRow,
    TrialRow,
)


@dataclass(frozen=True)
class ObjectiveView:
    """An objective of the search; `index` is its position in lists of scores."""

    name: str
    index: int
    lower: bool
    unit: Unit
    terms: tuple[str, ...]
    test_items: int
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
class SearchView:
    """Everything that the page shows.

    Attributes:
        found: The search, finished or in progress.
        objectives: Its objectives with their units.
        dimensions: Its dimensions.
        comparison: Differences on test items by task, where candidates have their short names: trial-3 for NAME-trial-3. None for a search in
            progress.
    """

    found: SearchState
    objectives: tuple[ObjectiveView, ...]
    dimensions: tuple[DimensionView, ...]
    comparison: Comparison | None

    @classmethod
    def of(cls, found: SearchState) -> SearchView:
        """Build the view of a search."""
        comparison = _comparison(found) if isinstance(found, SearchResult) else None
        return cls(found, _objectives(found), tuple(_dimension(*one) for one in found.space.items()), comparison)

    @property
    def tested(self) -> Sequence[TestedRow]:
        """Configurations that were scored on test items."""
        return _tested(self.found)

    @property
    def progress(self) -> SearchProgress | None:
        """Numbers of candidates of a search in progress; None if it is finished."""
        return self.found.progress if isinstance(self.found, GrowingSearch) else None

    @property
    def importances(self) -> dict[str, list[tuple[str, float]]]:
        """Objective -> dimensions with their shares of the variation in scores, the largest first."""
        every = self.found.importances.items()
        return {name: sorted(shares.items(), key=lambda share: -share[1]) for name, shares in every if shares}

    @property
    def command(self) -> str:
        """Command line that runs the search again."""
        return self.found.command or shell("workbench", "search", self.found.name)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the search, then those of its comparison."""
        own = (*(self.found.guarded or ()), *self.found.warnings)
        return (*own, *(self.comparison.warnings if self.comparison else ()))

    @property
    def searched(self) -> tuple[TrialRow, ...]:
        """Candidates drawn by the sampler."""
        return tuple(c for c in self.found.trials if not c.random)

    @property
    def drawn(self) -> tuple[TrialRow, ...]:
        """Candidates drawn at random."""
        return tuple(c for c in self.found.trials if c.random)

    @property
    def chosen(self) -> list[str]:
        """The winner, or the Pareto front if there are several objectives."""
        return [self.found.winner] if self.found.winner else self.found.front or []

    def row(self, name: str, part: TestedPart) -> TestedRow | None:
        """Return the tested configuration of a name; `part` separates a control from a candidate of the same name."""
        return next((t for t in self.tested if t.name == name and t.part == part), None)

    def paired(self, tested: TestedRow, objective: ObjectiveView) -> CandidateVerdict | None:
        """Return a candidate's paired difference from the best control under one objective; None for a control."""
        if tested.part == "control" or not isinstance(self.found, SearchResult):
            return None
        return self.found.test.against[tested.name][objective.index]


def _tested(found: SearchState) -> Sequence[TestedRow]:
    return found.test.rows if isinstance(found, SearchResult) else ()


def _objectives(found: SearchState) -> tuple[ObjectiveView, ...]:
    """Return the objectives with their units: percent if higher is better and all scores except estimates are shares."""
    objectives = []
    for i, objective in enumerate(found.objectives):
        levels = [c.scores[i] for c in found.controls]
        levels += [c.scores[i] for c in found.trials if c.scores and not c.stopped]
        levels += [level for row in _tested(found) for level in (row.search[i], row.test[i])]
        share = not objective.lower and all(0 <= v <= 1 for v in levels)
        unit = POINTS if share else raw(max((abs(v) for v in levels), default=0.0))
        terms = tuple("/".join(term) for term in objective.terms)
        objectives.append(ObjectiveView(objective.name, i, objective.lower, unit, terms, objective.items.test))
    return tuple(objectives)


def _dimension(name: str, domain: Range | Choices) -> DimensionView:
    if isinstance(domain, Choices):
        return DimensionView(name, tuple(written(v) for v in domain.choices))
    return DimensionView(name, (), domain.low, domain.high, domain.log)


def _comparison(found: SearchResult) -> Comparison:
    """Return the comparison on test items, with the search's short names of candidates."""
    whole = found.test.comparison
    names = {c.name for c in whole.configurations}
    short = {f"{found.name}-{t.name}": t.name for t in _tested(found) if t.part != "control" and t.name not in names}
    renamed = {
        "baseline": short.get(whole.baseline, whole.baseline),
        "configurations": [c.model_copy(update={"name": short.get(c.name, c.name)}) for c in whole.configurations],
        "rows": [r.model_copy(update={"configuration": short.get(r.configuration, r.configuration)}) for r in whole.rows],
    }
    return Comparison.model_validate({**dict(whole), **renamed})  # a copy would keep what is computed from the long names


def number(value: object) -> float | None:
    """Return a dimension's value as a number, or None if it is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def written(value: object) -> str:
    """Format a dimension's value as in recipes, with a typographic minus sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return figures(value, 6)
    return str(value)
