"""What a search makes best: means over tasks of a suite, compared candidate by candidate on the items that both have seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workbench.errors import WorkbenchError, nearest
from workbench.recipe.recipe import Recipe
from workbench.recipe.search_fields import SEPARATOR
from workbench.scores.changes import Changes, pooled
from workbench.scores.paired import paired
from workbench.scores.plan import ScorePlan
from workbench.scores.statistics import FEW_CLUSTERS
from workbench.scores.store import Row

Key = tuple[str, str]
"""Suite and task."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """One metric of one task."""

    key: Key
    metric: str
    sign: float
    """-1 where lower is better."""


@dataclass(frozen=True)
class Objective:
    """The mean of some metrics; a lower-is-better metric counts negative where others stand beside it."""

    name: str
    terms: tuple[Term, ...]

    @property
    def lower(self) -> bool:
        """Whether less is better: of a single metric that is so."""
        return len(self.terms) == 1 and self.terms[0].sign < 0

    def shown(self, value: float) -> float:
        """A value (higher is better) in the metric's own direction."""
        return -value if self.lower else value


@dataclass(frozen=True)
class Answers:
    """What a configuration scored on the items that it has seen so far, in the order in which they are seen.

    Attributes:
        scores: Suite and task -> metric -> one number an item; of a metric that the first items alone have, as many as have it.
        clusters: Suite and task -> one label an item.
    """

    scores: Mapping[Key, Mapping[str, Floats]]
    clusters: Mapping[Key, Sequence[str]]

    @property
    def items(self) -> int:
        """Seen, over all tasks."""
        return sum(map(len, self.clusters.values()))

    def value(self, objective: Objective) -> float:
        """An objective on all items seen; higher is better."""
        return float(np.mean([term.sign * self.scores[term.key][term.metric].mean() for term in objective.terms]))

    def mean(self, keys: Iterable[Key], metric: str) -> float | None:
        """The mean of a metric over the tasks that have it; None if none has."""
        found = [self.scores[key][metric].mean() for key in keys if metric in self.scores[key]]
        return float(np.mean(found)) if found else None


def gathered(parts: Iterable[tuple[ScorePlan, Mapping[str, Sequence[Row]]]]) -> Answers:
    """Answers from stored rows, plan after plan."""
    scores: dict[Key, dict[str, list[float]]] = {}
    clusters: dict[Key, list[str]] = {}
    for plan, rows in parts:
        for task, items in plan.items.items():
            key = (plan.suite.suite, task)
            clusters.setdefault(key, []).extend(item.cluster for item in items)
            found = scores.setdefault(key, {})
            for row in rows.get(task, ()):
                for metric, value in row["metrics"].items():
                    if isinstance(value, (int, float)):  # a ratio of sums has no score of an item
                        found.setdefault(metric, []).append(value)
    arrays = {key: {metric: np.array(values, np.float64) for metric, values in found.items()} for key, found in scores.items()}
    return Answers(arrays, clusters)


@dataclass(frozen=True)
class Gap:
    """The difference of an objective between two configurations on the items that both have seen.

    Attributes:
        changes: Of the mean over the terms; terms are independent.
        unchanged: No item has another score.
        clusters: Of the term with the fewest.
    """

    changes: Changes
    unchanged: bool
    clusters: int

    @property
    def diff(self) -> float:
        """Mean over the terms of the mean paired differences."""
        return 0.0 if self.unchanged else self.changes.mean

    @property
    def p(self) -> float:
        """Two-sided, of "no difference"."""
        return 1.0 if self.unchanged else self.changes.p

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Two-sided, of confidence 1 - level. Without any changed item (0, 0)."""
        return (0.0, 0.0) if self.unchanged else self.changes.interval(self.changes.critical(level), self.p <= level)

    def below(self, level: float = 0.05) -> bool:
        """Whether the interval lies below 0; the test alone tells, without the interval's ends."""
        return self.diff < 0 and self.p <= level

    def verdict(self, level: float = 0.05) -> str:
        """better | worse | cannot tell | no item changed."""
        if self.unchanged:
            return "no item changed"
        if self.clusters < FEW_CLUSTERS or self.p > level:
            return "cannot tell"
        return "better" if self.diff > 0 else "worse"

    def reason(self, level: float = 0.05) -> str | None:
        """Why the verdict is "cannot tell"; None for other verdicts."""
        if self.verdict(level) != "cannot tell":
            return None
        if self.clusters < FEW_CLUSTERS:
            return f"too few clusters: {self.clusters}, at least {FEW_CLUSTERS} needed"
        return "the interval holds 0"


def gap(before: Answers, after: Answers, objective: Objective) -> Gap:
    """How much better `after` is, on the items that both have seen."""
    return _combined(before, after, [(t.key, t.metric, t.sign) for t in objective.terms])


def gold_gap(before: Answers, after: Answers, objectives: Sequence[Objective], metric: str) -> Gap | None:
    """The same for the log-probability of right answers over the objectives' tasks; None where no task has it."""
    keys = dict.fromkeys(term.key for objective in objectives for term in objective.terms)
    usable = [(key, metric, 1.0) for key in keys if metric in before.scores[key] and metric in after.scores[key]]
    return _combined(before, after, usable) if usable else None


def _combined(before: Answers, after: Answers, terms: Sequence[tuple[Key, str, float]]) -> Gap:
    pairs = []
    for key, metric, sign in terms:
        a, b = (answers.scores[key][metric] for answers in (before, after))
        n = min(len(a), len(b))
        pairs.append(paired(sign * a[:n], sign * b[:n], after.clusters[key][:n]))
    changes = pooled([pair.changes for pair in pairs])
    return Gap(changes, all(pair.unchanged for pair in pairs), min(pair.clusters for pair in pairs))


def objectives_of(recipe: Recipe, plans: Sequence[ScorePlan]) -> list[Objective]:
    """The objectives of a recipe's search, over the plans that score it.

    Errors, before anything is loaded: a suite, task or metric that is not there, a metric that is no mean over items.
    """
    assert recipe.fields.search is not None
    names = recipe.fields.search.objectives or (plans[0].suite.suite,)
    found = [_objective(recipe, name, plans) for name in names]
    if len({o.terms for o in found}) < len(found):
        raise _error(recipe, f"two objectives are the same: {', '.join(names)}")
    return found


def _objective(recipe: Recipe, name: str, plans: Sequence[ScorePlan]) -> Objective:
    head, *rest = name.split(SEPARATOR)
    by_suite = {plan.suite.suite: plan for plan in plans}
    if head not in by_suite:
        holders = [plan for plan in plans if head in plan.suite.tasks]
        if len(holders) != 1 or len(rest) > 1:
            known = [*by_suite, *(task for plan in plans for task in plan.suite.tasks)]
            raise _error(recipe, f"no suite or task '{head}' is scored by `eval`. {nearest(head, known)}")
        by_suite, rest, head = {holders[0].suite.suite: holders[0]}, [head, *rest], holders[0].suite.suite
    plan = by_suite[head]
    if not rest:
        skills = [task for task in plan.suite.tasks if plan.suite.role_of(task) == "skill"] or list(plan.suite.tasks)
        return Objective(name, tuple(_term(recipe, name, plan, task, plan.primary(task)) for task in skills))
    task = rest[0]
    if task not in plan.suite.tasks:
        raise _error(recipe, f"suite '{head}' has no task '{task}'. {nearest(task, plan.suite.tasks)}")
    metric = rest[1] if len(rest) > 1 else plan.primary(task)
    if metric not in plan.metrics[task] and metric != plan.primary(task):
        raise _error(recipe, f"task '{task}' has no metric '{metric}'. {nearest(metric, plan.metrics[task])}")
    return Objective(name, (_term(recipe, name, plan, task, metric),))


def _term(recipe: Recipe, name: str, plan: ScorePlan, task: str, metric: str) -> Term:
    if metric in plan.ratios.get(task, {}):
        raise _error(
            recipe, f"'{name}': {metric} of '{task}' is a ratio of sums, and candidates are compared item by item",
            "Name tasks whose metric is a mean over items: acc, exact_match.",
        )  # fmt: skip
    return Term((plan.suite.suite, task), metric, -1.0 if metric in plan.lower.get(task, ()) else 1.0)


def _error(recipe: Recipe, message: str, hint: str | None = None) -> WorkbenchError:
    return recipe.error(("search", "objective"), message, hint)
