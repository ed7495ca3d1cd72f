"""The report's view of edited facts: a table of their tasks, and the number of facts that survive in each configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from workbench.report.numbers import MISSING, PERCENT, count, listed
from workbench.report.view import ConfigurationView, Estimate, TaskView, View
from workbench.tables import Cell

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
    "generated": ("Generated", "natural stop"),
    "generated-paraphrase": ("Generated, paraphrase", "natural stop"),
    "entropy": ("n-gram entropy", "bits"),
    "text": ("Text", "bits per byte, lower is better"),
}
COHORTS = {"first": "first facts", "last": "latest facts", "sample": "sample of all so far"}
FIRST = ("efficacy", "paraphrase", "neighbours", "neighbours-strict", "generated", "portability")


@dataclass(frozen=True)
class KeptFacts:
    """Number and share of right answers among the `of` facts or prompts that the edit alone answers right."""

    kept: int
    of: int
    share: Estimate | None

    @property
    def text(self) -> str:
        """The counts in words, such as "18 of 20"."""
        return f"{count(self.kept)} of {count(self.of)}"


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
    rows: tuple[tuple[ConfigurationView, dict[str, KeptFacts]], ...]
    without: tuple[str, ...] = ()

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
    scores: dict[str, Estimate]


@dataclass(frozen=True)
class Written:
    """Generated answers of one configuration that is edited for the facts.

    Attributes:
        exact: Share of the generated texts that are the target and stop by themselves.
        begins: Share of the generated texts that begin with the target; None if it is not stored.
        forced: Teacher-forced efficacy on the same facts.
        gap: Paired difference of `exact` from `forced`.
    """

    configuration: str
    exact: Estimate
    begins: Estimate | None
    forced: Estimate
    gap: Estimate

    def sentence(self) -> str:
        """Return the shares in words, and the gap to teacher forcing if its interval excludes 0."""
        text = f"{self.configuration} generates the target and stops for {_share(self.exact)} of the facts"
        if self.begins is not None:
            text += f"; {_share(self.begins)} of the texts begin with the target"
        gap, low, high = self.gap.value, self.gap.low, self.gap.high
        if gap is None or low is None or high is None or low <= 0 <= high:
            return f"{text}."
        more = "lower" if gap < 0 else "higher"
        ends = sorted((abs(low), abs(high)))
        return (
            f"{text}. This is {PERCENT.score(abs(gap))} points {more} {PERCENT.levels(*ends)} than its teacher-forced "
            f"efficacy of {PERCENT.score(self.forced.value)} %."
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
        written: Generated answers beside teacher-forced ones, one per configuration that is edited for the facts.
        control_missing: An edit was scored only as part of other configurations, not alone.
    """

    name: str
    source: str
    facts: int
    columns: tuple[tuple[str, TaskView], ...]
    rows: tuple[ConfigurationView, ...]
    survivals: tuple[Survival, ...]
    steps: tuple[EditedStep, ...] = ()
    control_missing: bool = False
    written: tuple[Written, ...] = ()

    @property
    def followed(self) -> tuple[str, ...]:
        """Kinds of tasks in `steps`."""
        return tuple(dict.fromkeys(kind for step in self.steps for kind in step.scores))


def fact_suites(document: Mapping[str, Any], view: View) -> list[FactSuite]:
    """Return the suites of edited facts in a comparison document."""
    suites = []
    for entry in document.get("facts") or ():
        task_of = {str(kind): view.task(str(task)) for kind, task in (entry.get("tasks") or {}).items()}
        columns = tuple((kind, task) for kind in _ordered(task_of) if (task := task_of[kind]) is not None)
        rows = tuple(c for c in view.configurations if any(task.name in c.scores for _, task in columns))
        if columns and rows:
            survivals = tuple(s for part in entry.get("survival") or () if (s := _survival(part, view)) is not None)
            steps = tuple(_steps(entry.get("sequence") or ()))
            name, source, facts = str(entry["suite"]), str(entry.get("source") or ""), int(entry.get("facts") or 0)
            order = [c.name for c in view.configurations]
            generated = [row for row in entry.get("generation") or () if row["configuration"] in order]
            written = tuple(map(_written, sorted(generated, key=lambda row: order.index(row["configuration"]))))
            missing = bool(entry.get("control_missing"))
            suites.append(FactSuite(name, source, facts, columns, rows, survivals, steps, missing, written))
    return suites


def heading(kind: str) -> tuple[str, str]:
    """Return a column's heading and its second line."""
    return HEADINGS.get(kind, (kind, ""))


def markdown_rows(suite: FactSuite) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the table of scores."""
    header = ["Configuration", *(f"{heading(kind)[0]} ({heading(kind)[1]})" for kind, _ in suite.columns)]
    rows = [[c.name, *(_level(c.scores.get(task.name), task) for _, task in suite.columns)] for c in suite.rows]
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


def _share(e: Estimate | None) -> str:
    if e is None:
        return MISSING
    return PERCENT.cell(f"{PERCENT.score(e.value)} % {PERCENT.levels(e.low, e.high)}", e.value, e.low, e.high)


def _written(row: Mapping[str, Any]) -> Written:
    exact, forced = (Estimate(**row[name]) for name in ("exact", "forced"))
    begins, gap = row["begins"], row["gap"]
    return Written(
        str(row["configuration"]),
        exact,
        Estimate(**begins) if begins else None,
        forced,
        Estimate(gap["diff"], gap["low"], gap["high"]),
    )


def _steps(rows: Iterable[Mapping[str, Any]]) -> Iterable[EditedStep]:
    for row in rows:
        for cohort, scores in row["cohorts"].items():
            estimates = {str(k): Estimate(v["value"], v.get("low"), v.get("high"), n=v.get("n")) for k, v in scores.items()}
            yield EditedStep(str(row["configuration"]), int(row["facts"]), str(cohort), estimates)


def _ordered(kinds: Iterable[str]) -> list[str]:
    all_kinds = list(kinds)
    return [*(k for k in FIRST if k in all_kinds), *(k for k in all_kinds if k not in FIRST)]


def _survival(part: Mapping[str, Any], view: View) -> Survival | None:
    answers = part.get("rows") or {}
    rows = tuple((c, {str(k): _kept(v) for k, v in answers[c.name].items()}) for c in view.configurations if c.name in answers)
    kinds = _ordered(dict.fromkeys(kind for _, kept in rows for kind, k in kept.items() if k.of))
    return Survival(str(part["alone"]), tuple(kinds), rows, tuple(map(str, part.get("without") or ()))) if kinds else None


def _kept(value: Mapping[str, Any]) -> KeptFacts:
    share = Estimate(value["value"], value.get("low"), value.get("high")) if value.get("value") is not None else None
    return KeptFacts(int(value["kept"]), int(value["of"]), share)


def _surviving(kept: KeptFacts) -> Cell:
    e = kept.share
    return PERCENT.cell(f"{kept.text}{_percent(kept)}", *((e.value, e.low, e.high) if e else (None,)))


def _percent(kept: KeptFacts) -> str:
    if kept.share is None:
        return ""
    return f" ({PERCENT.score(kept.share.value)} % {PERCENT.levels(kept.share.low, kept.share.high)})"


def _level(e: Estimate | None, task: TaskView) -> str:
    if e is None:
        return MISSING
    return task.unit.cell(f"{task.unit.score(e.value)} {task.unit.levels(e.low, e.high)}".strip(), e.value, e.low, e.high)
