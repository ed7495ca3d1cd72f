"""What the page of a search shows: the search's result with the units of its objectives and the domains of its dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workbench.compare.comparison import Comparison
from workbench.errors import shell
from workbench.report.chart import Ends
from workbench.report.numbers import MINUS, POINTS, Unit, raw
from workbench.search.result import CandidateVerdict, GrowingSearch, Progress, SearchResult, SearchState, TestedRow, TrialRow


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
    """A search as its page shows it.

    Attributes:
        result: The search, finished or in progress.
        objectives: Its objectives with their units.
        dimensions: Its dimensions.
        comparison: Differences on test items by task; None in progress.
    """

    result: SearchState
    objectives: tuple[ObjectiveView, ...]
    dimensions: tuple[DimensionView, ...]
    comparison: Comparison | None

    @property
    def progress(self) -> Progress | None:
        """The progress of a search that is not finished."""
        return self.result.progress if isinstance(self.result, GrowingSearch) else None

    @property
    def tested(self) -> Sequence[TestedRow]:
        """Configurations that were scored on test items; none in progress."""
        return self.result.test.rows if isinstance(self.result, SearchResult) else ()

    @property
    def warnings(self) -> list[str]:
        """What was found on guarded tasks, warnings of the search, then those of its comparison."""
        found = [*(self.result.guarded or ()), *self.result.warnings]
        return [*found, *(self.comparison.warnings if self.comparison else ())]

    @property
    def command(self) -> str:
        """The command line that runs the search again."""
        return self.result.command or shell("workbench", "search", self.result.name)

    @property
    def searched(self) -> list[TrialRow]:
        """Candidates drawn by the sampler."""
        return [c for c in self.result.trials if not c.random]

    @property
    def drawn(self) -> list[TrialRow]:
        """Candidates drawn at random."""
        return [c for c in self.result.trials if c.random]

    @property
    def chosen(self) -> Sequence[str]:
        """The winner, or the Pareto front if there are several objectives."""
        return [self.result.winner] if self.result.winner else self.result.front or []

    def row(self, name: str, part: str) -> TestedRow | None:
        """Return the tested configuration of a name; `part` separates a control from a candidate of the same name."""
        return next((t for t in self.tested if (t.name, t.part) == (name, part)), None)

    def against(self, tested: TestedRow, objective: ObjectiveView) -> CandidateVerdict | None:
        """Return a candidate's paired difference from the best control under one objective; None for a control."""
        if tested.part == "control" or not isinstance(self.result, SearchResult):
            return None
        return self.result.test.against[tested.name][objective.index]


def ends_of(trial: TrialRow, objective: ObjectiveView) -> Ends:
    """Return the interval of a candidate's score under one objective, or None."""
    pair = trial.intervals[objective.index] if trial.intervals else None
    return (pair[0], pair[1]) if pair else None


def search_of(result: SearchState) -> SearchView:
    """Return the view of a search, finished or in progress."""
    dimensions = []
    for name, domain in result.space.items():
        if choices := domain.get("choices"):
            dimensions.append(DimensionView(name, tuple(map(written, choices))))
        else:
            dimensions.append(DimensionView(name, (), domain["low"], domain["high"], bool(domain["log"])))
    return SearchView(result, _objectives(result), tuple(dimensions), _comparison(result))


def _objectives(result: SearchState) -> tuple[ObjectiveView, ...]:
    """Return the objectives with their units: percent if higher is better and all scores except estimates are shares."""
    rows = result.test.rows if isinstance(result, SearchResult) else []
    scores = [c.scores for c in result.controls]
    scores += [c.scores for c in result.trials if c.complete and c.scores is not None]
    scores += [half for row in rows for half in (row.search, row.test)]
    objectives = []
    for i, one in enumerate(result.objectives):
        levels = [of[i] for of in scores]
        share = not one.lower and all(0 <= v <= 1 for v in levels)
        unit = POINTS if share else raw(max((abs(v) for v in levels), default=0.0))
        terms = tuple("/".join(term) for term in one.terms)
        objectives.append(ObjectiveView(one.name, i, one.lower, unit, terms, one.items.test))
    return tuple(objectives)


def _comparison(result: SearchState) -> Comparison | None:
    """Return the comparison on test items, with the search's short names of candidates: trial-3 for NAME-trial-3."""
    if not isinstance(result, SearchResult) or not (document := result.test.comparison):
        return None
    names = {c["name"] for c in document["configurations"]}
    tested = [t.name for t in result.test.rows if t.part != "control" and t.name not in names]
    short = {f"{result.name}-{name}": name for name in tested}
    renamed = {
        **document,
        "baseline": short.get(document["baseline"], document["baseline"]),
        "configurations": [{**c, "name": short.get(c["name"], c["name"])} for c in document["configurations"]],
        "rows": [{**r, "configuration": short.get(r["configuration"], r["configuration"])} for r in document["rows"]],
    }
    hint = "Run the search again: its result is of an earlier version."
    return Comparison.of(renamed, f"comparison of {result.name}", hint)


def number(value: object) -> float | None:
    """Return a dimension's value as a number, or None if it is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def written(value: object) -> str:
    """Format a dimension's value as in recipes, with a typographic minus sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.6g}".replace("-", MINUS)
    return str(value)
