"""Objectives of a search: means over tasks of a suite, compared between two configurations on the items that both have.

A candidate that is worse than a rival is stopped early, and its scores are estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workbench.evaluate.models import GOLD
from workbench.ground.errors import WorkbenchError, nearest
from workbench.recipe.fields import SEPARATOR
from workbench.recipe.recipe import Recipe
from workbench.scores.changes import Changes, pooled
from workbench.scores.paired import paired, paired_scores
from workbench.scores.plan import ScorePlan
from workbench.scores.statistics import FEW_CLUSTERS, RATIOS, SHARED_RANGE
from workbench.scores.store import Row
from workbench.scores.suite import MARGIN, reach_of
from workbench.scores.unseen import alone
from workbench.search.result import Loss

Key = tuple[str, str]
"""Suite and task."""
Floats = NDArray[np.float64]
LEVEL = 0.05
"""Error rate of the intervals that stop a candidate, and of verdicts."""


@dataclass(frozen=True)
class Term:
    """One metric of one task."""

    key: Key
    metric: str
    sign: float
    """-1 if lower is better, else 1."""


@dataclass(frozen=True)
class Objective:
    """The mean of some metrics; metrics where lower is better count as negative."""

    name: str
    terms: tuple[Term, ...]

    @property
    def lower(self) -> bool:
        """True for a single metric where lower is better."""
        return len(self.terms) == 1 and self.terms[0].sign < 0

    def shown(self, value: float) -> float:
        """Convert a value with higher as better to the metric's own direction."""
        return -value if self.lower else value


@dataclass(frozen=True)
class Answers:
    """Scores of a configuration on the items so far, in the order of the stages.

    Attributes:
        scores: One number per item by (suite, task) and metric; a metric that only the first items have is shorter.
        clusters: One label per item by (suite, task).
        guarded: Values of the primary metric on guarded tasks [items, width], by (suite, task), as stored rows hold them.
    """

    scores: Mapping[Key, Mapping[str, Floats]]
    clusters: Mapping[Key, Sequence[str]]
    guarded: Mapping[Key, Floats] = field(default_factory=dict)

    @property
    def items(self) -> int:
        """Number of items over all tasks."""
        return sum(map(len, self.clusters.values()))

    def value(self, objective: Objective) -> float:
        """Return the value of an objective on these items; higher is better."""
        return float(np.mean([term.sign * self.scores[term.key][term.metric].mean() for term in objective.terms]))

    def mean(self, keys: Iterable[Key], metric: str) -> float | None:
        """Return the mean of a metric over the tasks that have it, or None if no task has it."""
        means = [self.scores[key][metric].mean() for key in keys if metric in self.scores[key]]
        return float(np.mean(means)) if means else None


def gathered(parts: Iterable[tuple[ScorePlan, Mapping[str, Sequence[Row]]]]) -> Answers:
    """Return the answers of stored rows, plan after plan."""
    scores: dict[Key, dict[str, list[float]]] = {}
    clusters: dict[Key, list[str]] = {}
    for plan, rows in parts:
        for task, items in plan.items.items():
            key = (plan.suite.suite, task)
            clusters.setdefault(key, []).extend(item.cluster for item in items)
            by_metric = scores.setdefault(key, {})
            for row in rows.get(task, ()):
                for metric, value in row["metrics"].items():
                    if isinstance(value, (int, float)):  # a metric of all items together has no score per item
                        by_metric.setdefault(metric, []).append(value)
    arrays = {key: {m: np.array(values, np.float64) for m, values in by_metric.items()} for key, by_metric in scores.items()}
    return Answers(arrays, clusters)


def guarded_values(plan: ScorePlan, rows: Mapping[str, Sequence[Row]]) -> dict[Key, Floats]:
    """Return the values of the primary metrics [items, width] of a plan's tasks.

    Raises:
        WorkbenchError: If an item has none.
    """
    found = {}
    for task, task_rows in rows.items():
        metric = plan.primary(task)
        values = [row["metrics"].get(metric) for row in task_rows]
        if None in values:
            raise WorkbenchError(
                f"suite '{plan.suite.suite}': guarded task '{task}' has no '{metric}' for item '{task_rows[values.index(None)]['id']}'",
                "Choose another `primary` metric for it in the suite.",
            )
        found[plan.suite.suite, task] = np.array(values, np.float64).reshape(len(values), -1)
    return found


def losses(plans: Sequence[ScorePlan], base: Answers, answers: Answers) -> list[Loss]:
    """Return a configuration's losses on guarded tasks.

    Args:
        plans: Plans of the guarded tasks.
        base: Answers of the base.
        answers: Answers of the configuration on the same items.
    """
    found = []
    for plan in plans:
        for task, items in plan.items.items():
            metric, key = plan.primary(task), (plan.suite.suite, task)
            kind = plan.ratios.get(task, {}).get(metric)
            before, after = base.guarded[key], answers.guarded[key]
            weights = before[:, 1] if kind in RATIOS else None
            pair = paired_scores(kind, before[:, 0], after[:, 0], [item.cluster for item in items], weights)
            loss = pair.diff if metric in plan.lower.get(task, ()) else -pair.diff
            inside = bool(min(before.min(), after.min()) >= 0 and max(before.max(), after.max()) <= 1)
            share = kind in SHARED_RANGE or (kind is None and metric != MARGIN and inside)
            tolerance = plan.suite.tolerance_of(task, share=share)
            harmful = loss > 0 and pair.p <= LEVEL if tolerance is None else loss > tolerance + 1e-12
            shown = float(loss) if math.isfinite(loss) else 0.0
            found.append(Loss(task=task, loss=shown, tolerance=tolerance, harmful=bool(harmful)))
    return found


@dataclass(frozen=True)
class Gap:
    """The difference of an objective between two configurations on the items that both have.

    Attributes:
        changes: Changes of the mean over the terms, which are independent.
        unchanged: True if no item has another score.
        clusters: Number of clusters of the term with the fewest.
    """

    changes: Changes
    unchanged: bool
    clusters: int

    @property
    def diff(self) -> float:
        """Mean over the terms of the mean paired differences."""
        return 0.0 if self.unchanged else self.changes.mean

    @cached_property
    def p(self) -> float:
        """Two-sided p value of "no difference"."""
        return 1.0 if self.unchanged else alone(self.changes).p

    def interval(self) -> tuple[float, float]:
        """Return the two-sided 95 % interval; (0, 0) if no item changed."""
        return (0.0, 0.0) if self.unchanged else self.changes.interval(self.changes.critical(LEVEL), self.p <= LEVEL)

    def below(self) -> bool:
        """Return True if the interval lies below 0; the test decides this without computing the interval."""
        return self.diff < 0 and self.p <= LEVEL

    def verdict(self) -> Literal["better", "worse", "cannot tell", "no item changed"]:
        """Return the verdict."""
        if self.unchanged:
            return "no item changed"
        if self.clusters < FEW_CLUSTERS or self.p > LEVEL:
            return "cannot tell"
        return "better" if self.diff > 0 else "worse"

    def reason(self) -> str | None:
        """Return the reason of the verdict "cannot tell"; None for other verdicts."""
        if self.verdict() != "cannot tell":
            return None
        if self.clusters < FEW_CLUSTERS:
            return f"too few clusters: {self.clusters}, at least {FEW_CLUSTERS} needed"
        return "the interval includes 0"


def gap(before: Answers, after: Answers, objective: Objective) -> Gap:
    """Return the difference `after` - `before` of an objective on the items that both have; positive means better."""
    return _combined(before, after, [(t.key, t.metric, t.sign) for t in objective.terms])


def gold_gap(before: Answers, after: Answers, objectives: Sequence[Objective], metric: str) -> Gap | None:
    """Return the difference of the log-probability of right answers over the objectives' tasks; None if no task has it."""
    keys = dict.fromkeys(term.key for objective in objectives for term in objective.terms)
    usable = [(key, metric, 1.0) for key in keys if metric in before.scores[key] and metric in after.scores[key]]
    return _combined(before, after, usable) if usable else None


def _combined(before: Answers, after: Answers, terms: Sequence[tuple[Key, str, float]]) -> Gap:
    pairs = []
    for key, metric, sign in terms:
        a, b = (answers.scores[key][metric] for answers in (before, after))
        n = min(len(a), len(b))
        a, b = a[:n], b[:n]
        pairs.append(paired(sign * a, sign * b, after.clusters[key][:n], reach=reach_of(metric, a, b)))
    changes = pooled([pair.changes for pair in pairs])
    return Gap(changes, all(pair.unchanged for pair in pairs), min(pair.clusters for pair in pairs))


def objectives_of(recipe: Recipe, plans: Sequence[ScorePlan]) -> list[Objective]:
    """Return the objectives of a recipe's search over the plans that score it.

    Raises:
        WorkbenchError: If a suite, task or metric does not exist, or a metric is not a mean over items.
    """
    assert recipe.fields.search is not None
    names = recipe.fields.search.objectives or (plans[0].suite.suite,)
    objectives = [_objective(recipe, name, plans) for name in names]
    if len({o.terms for o in objectives}) < len(objectives):
        raise _error(recipe, f"two objectives are the same: {', '.join(names)}")
    return objectives


def only_objectives(score_plans: Sequence[ScorePlan], objectives: Sequence[Objective]) -> list[ScorePlan]:
    """Return the plans with only the tasks of the objectives."""
    keys = {term.key for objective in objectives for term in objective.terms}
    selected = [plan.only({task for suite, task in keys if suite == plan.suite.suite}) for plan in score_plans]
    return [plan for plan in selected if plan.suite.tasks]


def _objective(recipe: Recipe, name: str, plans: Sequence[ScorePlan]) -> Objective:
    """Return the objective of a name: SUITE, SUITE/TASK, SUITE/TASK/METRIC, or a task that one suite has."""
    head, *rest = name.split(SEPARATOR)
    by_suite = {plan.suite.suite: plan for plan in plans}
    if head not in by_suite:
        holders = [plan for plan in plans if head in plan.suite.tasks]
        if len(holders) != 1 or len(rest) > 1:
            known = [*by_suite, *(task for plan in plans for task in plan.suite.tasks)]
            raise _error(recipe, f"`eval` scores no suite or task '{head}'. {nearest(head, known)}")
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
            recipe,
            f"'{name}': {metric} of '{task}' is computed from all items together, but candidates are compared item by item",
            "Use tasks whose metric is a mean over items, such as acc or exact_match.",
        )
    return Term((plan.suite.suite, task), metric, -1.0 if metric in plan.lower.get(task, ()) else 1.0)


def _error(recipe: Recipe, message: str, hint: str | None = None) -> WorkbenchError:
    return recipe.error(("search", "objective"), message, hint)


@dataclass(frozen=True)
class Rival:
    """A configuration that was scored on all search items.

    Attributes:
        name: Displayed name.
        answers: Answers on all search items.
        scores: Scores under the objectives; higher is better.
    """

    name: str
    answers: Answers
    scores: tuple[float, ...]

    @classmethod
    def of(cls, name: str, answers: Answers, objectives: Sequence[Objective]) -> Rival:
        """Build a rival from its answers."""
        return cls(name, answers, tuple(answers.value(objective) for objective in objectives))


def front(rivals: Iterable[Rival]) -> list[Rival]:
    """Return the Pareto front, which for one objective is the best rival; of rivals with equal scores only the first is on it."""
    best: list[Rival] = []
    for rival in rivals:
        if any(_covers(other.scores, rival.scores) for other in best):
            continue
        best = [other for other in best if not _covers(rival.scores, other.scores)] + [rival]
    return best


def _covers(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True))


def beaten_by(answers: Answers, rivals: Sequence[Rival], objectives: Sequence[Objective], *, gold: bool) -> Rival | None:
    """Return the rival that beats a candidate on the items so far, or None.

    A rival beats it if the interval of the paired difference is below 0 under every objective. With one objective and `gold`, it also beats it
    if the interval for the log-probability of right answers is below 0, which often shows earlier, and the objective is not better.

    Args:
        answers: The candidate's answers so far.
        rivals: Configurations that were scored on all items.
        objectives: Objectives of the search.
        gold: Also compare the log-probability of right answers.
    """
    for rival in rivals:
        if all(gap(rival.answers, answers, objective).below() for objective in objectives):
            return rival
        if gold and len(objectives) == 1:
            difference = gold_gap(rival.answers, answers, objectives, GOLD)
            if difference is not None and difference.below() and gap(rival.answers, answers, objectives[0]).diff <= 0:
                return rival
    return None


def estimate(answers: Answers, rival: Rival, objectives: Sequence[Objective]) -> list[float]:
    """Estimate the scores of a stopped candidate on all items: the rival's score plus the difference on the items that both have.

    Unlike the candidate's score on few items, this estimate does not depend on the difficulty of these items.
    """
    return [score + gap(rival.answers, answers, o).diff for o, score in zip(objectives, rival.scores, strict=True)]
