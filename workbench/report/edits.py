"""The report's view of edited facts: a table of their tasks, and the number of facts that survive in each configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from workbench.compare.comparison import ComparedTask, Comparison
from workbench.compare.configurations import ComparedConfiguration, Level
from workbench.compare.routing import Share
from workbench.compare.survival import EditSurvival, KeptFacts, ShareOfPrompts, WrittenAnswers
from workbench.ground.numbers import MISSING, count, listed
from workbench.ground.tables import Cell
from workbench.report.numbers import PERCENT, Unit, unit_of

# Kind -> heading and method of measurement.
HEADINGS = {
    "efficacy": ("Efficacy", "teacher-forced"),
    "preferred": ("Target preferred", "token-mean likelihood"),
    "paraphrase": ("Paraphrase", "teacher-forced"),
    "preferred-paraphrase": ("Preferred, paraphrase", "token-mean likelihood"),
    "neighbours": ("Neighbors unchanged", "the base's answer"),
    "neighbours-right": ("Neighbors right", "the stated answer"),
    "neighbours-strict": ("Neighbors, strict", "the base's first tokens"),
    "preferred-neighbours": ("Preferred, neighbors", "token-mean likelihood"),
    "portability": ("Portability", "teacher-forced"),
    "same-subject": ("Same subject unchanged", "the base's first token"),
    "typo": ("Typo", "in the subject"),
    "lower-case": ("Lower case", "teacher-forced"),
    "behind-text": ("Behind text", "teacher-forced"),
    "translated": ("Translated", "teacher-forced"),
    "chat": ("Chat", "target in the answer"),
    "generated": ("Generated", "natural stop"),
    "generated-paraphrase": ("Generated, paraphrase", "natural stop"),
    "entropy": ("n-gram entropy", "bits"),
    "text": ("Text", "bits per byte, lower is better"),
}
COHORTS = {"first": "first facts", "last": "latest facts", "sample": "sample of all so far"}
FIRST = ("efficacy", "paraphrase", "neighbours-strict", "same-subject", "generated", "chat", "typo", "lower-case", "behind-text")


@dataclass(frozen=True)
class Survival:
    """Survival of one edit in other configurations.

    Attributes:
        alone: The configuration that has the edit and nothing else.
        kinds: Kinds of tasks, one per column.
        rows: Configurations in the order of the report, with their answers by kind.
        without: Names of the configurations in `rows` that do not have the edit.
    """

    alone: str
    kinds: tuple[str, ...]
    rows: tuple[tuple[ComparedConfiguration, Mapping[str, KeptFacts]], ...]
    without: Sequence[str] = ()

    def sentence(self) -> str:
        """Return the first column's numbers for the configurations that have the edit, in words."""
        kind = self.kinds[0]
        right_alone = next(kept[kind].of for _, kept in self.rows if kind in kept)
        others = [
            f"{c.name} {count(k.kept)}{_percent(k)}"
            for c, kept in self.rows
            if c.name not in self.without and (k := kept.get(kind))
        ]
        if not others:
            return (
                f"{self.alone} alone answers {count(right_alone)} right ({heading(kind)[0].lower()}); "
                "no configuration that includes it was scored."
            )
        return (
            f"{self.alone} alone answers {count(right_alone)} right ({heading(kind)[0].lower()}). "
            f"Right answers of other configurations among these: {listed(others)}."
        )


@dataclass(frozen=True)
class EditedStep:
    """Scores by kind on one cohort of facts, after an edit of the first `facts` facts."""

    configuration: str
    facts: int
    cohort: str
    scores: Mapping[str, ShareOfPrompts]


def generated(row: WrittenAnswers) -> str:
    """Return what a configuration generates in words, and the gap to teacher forcing if its interval excludes 0."""
    text = f"{row.configuration} generates the target and stops for {_share(row.exact)} of the facts"
    if row.begins is not None:
        text += f"; {_share(row.begins)} of the texts begin with the target"
    gap, low, high = row.gap.diff, row.gap.low, row.gap.high
    if low is None or high is None or low <= 0 <= high:
        return f"{text}."
    more = "lower" if gap < 0 else "higher"
    ends = sorted((abs(low), abs(high)))
    return (
        f"{text}. This is {PERCENT.score(abs(gap))} {PERCENT.levels(*ends)} points {more} than its teacher-forced "
        f"efficacy of {PERCENT.score(row.forced.value)} %."
    )


@dataclass(frozen=True)
class FactSuite:
    """Scores of one facts file.

    Attributes:
        facts: Number of facts.
        columns: Pairs (kind, task), the most important first.
        rows: Configurations that were scored on its tasks.
        survivals: One per configuration that has the edit alone.
        steps: Scores after the first n facts, by configuration and cohort.
        written: Sentences on generated answers beside teacher-forced ones, one per configuration that is edited for the facts.
        control_missing: An edit was scored only as part of other configurations, not alone.
    """

    name: str
    source: str
    facts: int
    columns: tuple[tuple[str, ComparedTask], ...]
    rows: tuple[ComparedConfiguration, ...]
    survivals: tuple[Survival, ...]
    steps: tuple[EditedStep, ...] = ()
    control_missing: bool = False
    written: tuple[str, ...] = ()

    @property
    def followed(self) -> tuple[str, ...]:
        """Kinds of tasks in `steps`."""
        return tuple(dict.fromkeys(kind for step in self.steps for kind in step.scores))


def fact_suites(view: Comparison) -> list[FactSuite]:
    """Return the suites of edited facts in a comparison."""
    suites = []
    order = [c.name for c in view.by_role]
    for entry in view.facts:
        task_of = {kind: view.task(task) for kind, task in entry.tasks.items()}
        columns = tuple((kind, task) for kind in _ordered(task_of) if (task := task_of[kind]) is not None)
        rows = tuple(c for c in view.by_role if any(task.name in c.scores for _, task in columns))
        if columns and rows:
            shown = [row for row in entry.generation if row.configuration in order]
            steps = [
                EditedStep(s.configuration, s.facts, name, scores) for s in entry.sequence for name, scores in s.cohorts.items()
            ]
            suites.append(
                FactSuite(
                    name=entry.suite,
                    source=entry.source,
                    facts=entry.facts,
                    columns=columns,
                    rows=rows,
                    survivals=tuple(s for part in entry.survival if (s := _survival(part, view)) is not None),
                    steps=tuple(steps),
                    control_missing=entry.control_missing,
                    written=tuple(map(generated, sorted(shown, key=lambda row: order.index(row.configuration)))),
                )
            )
    return suites


def heading(kind: str) -> tuple[str, str]:
    """Return a column's heading and its second line."""
    return HEADINGS.get(kind, (kind, ""))


def markdown_rows(suite: FactSuite, view: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table of scores."""
    header = ["Configuration", *(f"{heading(kind)[0]} ({heading(kind)[1]})" for kind, _ in suite.columns)]
    units = [(task.name, unit_of(view, task.name)) for _, task in suite.columns]
    rows = [[c.name, *(_level(c.scores.get(name), unit) for name, unit in units)] for c in suite.rows]
    return header, rows


def survival_rows(survival: Survival) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table of an edit's survival."""
    header = ["Configuration", *(heading(kind)[0] for kind in survival.kinds)]
    rows = [
        [c.name, *(_surviving(k) if (k := kept.get(kind)) else MISSING for kind in survival.kinds)] for c, kept in survival.rows
    ]
    return header, rows


def step_rows(suite: FactSuite) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table of facts added one after another."""
    header = ["Configuration", "Facts", "Cohort", *(heading(kind)[0] for kind in suite.followed)]
    rows = []
    for step in suite.steps:
        shares = [_share(step.scores.get(kind)) for kind in suite.followed]
        rows.append([step.configuration, count(step.facts), COHORTS.get(step.cohort, step.cohort), *shares])
    return header, rows


def counted(k: KeptFacts) -> str:
    """Return counts in words, such as "18 of 20"."""
    return f"{count(k.kept)} of {count(k.of)}"


def _share(e: Share | None) -> str:
    if e is None:
        return MISSING
    return PERCENT.cell(f"{PERCENT.score(e.value)} {PERCENT.levels(e.low, e.high)} %", e.value, e.low, e.high)


def _ordered(kinds: Iterable[str]) -> list[str]:
    all_kinds = list(kinds)
    return [*(k for k in FIRST if k in all_kinds), *(k for k in all_kinds if k not in FIRST)]


def _survival(part: EditSurvival, view: Comparison) -> Survival | None:
    rows = tuple((c, part.rows[c.name]) for c in view.by_role if c.name in part.rows)
    kinds = _ordered(dict.fromkeys(kind for _, kept in rows for kind, k in kept.items() if k.of))
    return Survival(part.alone, tuple(kinds), rows, part.without) if kinds else None


def _surviving(kept: KeptFacts) -> Cell:
    return PERCENT.cell(f"{counted(kept)}{_percent(kept)}", kept.value, kept.low, kept.high)


def _percent(kept: KeptFacts) -> str:
    return "" if kept.value is None else f" ({PERCENT.score(kept.value)} {PERCENT.levels(kept.low, kept.high)} %)"


def _level(e: Level | None, unit: Unit) -> str:
    if e is None:
        return MISSING
    return unit.cell(f"{unit.score(e.value)} {unit.levels(e.low, e.high)}".strip(), e.value, e.low, e.high)
