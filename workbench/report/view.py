"""Typed objects with everything that the pages show; `reading` builds them from the comparison document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.report.numbers import MINUS, POINTS, Unit, raw

ROLES = ("configuration", "base", "brick", "average", "memory", "finetune", "adapter")
RATIO_WORDS = {"bits_per_byte": "bits per byte"}
VERDICTS = ("better", "worse", "equivalent", "cannot tell", "safe", "not shown safe", "no item changed")
GUARD_WORDS = ("safe", "not shown safe")
"""Verdicts that only guarded tasks can have; "worse" and "no item changed" apply to all tasks."""
OPEN = ("cannot tell", "not shown safe")
"""Verdicts that more items could decide."""
IMPOSSIBLE = ("no difference can be significant", "no verdict can fall")
"""Beginnings of the reason of such a comparison; the second one is in documents of earlier versions."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, in stored units; `reason` says why there is no value."""

    value: float | None
    low: float | None
    high: float | None
    corrected: float | None = None
    n: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class TaskView:
    """A task under its primary metric, or a contrast of two tasks.

    Attributes:
        lower: Lower is better.
        ratio: Kind of a metric over the whole corpus, such as bits_per_byte; None for a mean over items.
        contrast: The two tasks, for a contrast.
        min_effect: Smallest difference of interest, in the metric's own units; None if the suite sets none.
        uncorrected: The chance score is not known, so means use the uncorrected score.
        tolerance: Largest loss on a guarded task that counts as safe, in the metric's own units; None if the suite or an older document has none.
    """

    name: str
    metric: str
    role: str
    n: int | None
    clusters: int | None
    chance: float | None
    owner: str | None
    unit: Unit
    lower: bool = False
    ratio: str | None = None
    scorer: str | None = None
    contrast: tuple[str, str] | None = None
    min_effect: float | None = None
    uncorrected: bool = False
    tolerance: float | None = None

    @property
    def guarded(self) -> bool:
        """True if the task must not get worse."""
        return self.role in ("retention", "guarded")

    @property
    def axis(self) -> str:
        """Key of the axis that the task shares with others: the role for shares, the task's own name for anything else."""
        return self.role if self.unit == POINTS and self.contrast is None else self.name

    @property
    def measure(self) -> str:
        """The metric's name, and for a contrast the subtraction."""
        parts = [self.metric]
        if self.contrast is not None:
            parts.append(f"{self.contrast[0]} {MINUS} {self.contrast[1]}")
        return ", ".join(p for p in parts if p)


@dataclass(frozen=True)
class CompanionView:
    """The difference of a second, continuous metric with an unadjusted 95 % interval; it does not decide any verdict."""

    metric: str
    unit: Unit
    value: float | None
    baseline_value: float | None
    diff: float | None
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class DifferenceView:
    """One configuration minus the baseline on one task and metric."""

    configuration: str
    role: str
    task: str
    metric: str
    value: float | None
    baseline_value: float | None
    diff: float | None
    low: float | None
    high: float | None
    low_adj: float | None
    high_adj: float | None
    p: float | None
    p_adj: float | None
    n: int | None
    clusters: int | None
    mde: float | None
    needs: int | None
    verdict: str | None
    reason: str | None
    wins: int | None
    losses: int | None
    lower: bool = False
    ratio: bool = False
    companion: CompanionView | None = None
    family: str | None = None
    tolerance: float | None = None

    @property
    def word(self) -> str | None:
        """The verdict word, without additions of the document such as "cannot tell (few clusters)"."""
        return verdict_word(self.verdict)

    @property
    def guarded(self) -> bool:
        """True if the verdict is about harm: safe, worse or not shown safe. Older documents have no such verdicts."""
        return self.family == "guarded"

    @property
    def apart(self) -> bool:
        """True if the comparison was tested among the controls, separately from the named configurations."""
        return self.family == "controls" or (self.guarded and self.role != "configuration")

    @property
    def impossible(self) -> bool:
        """True if the clusters are too few for any significant difference within the family."""
        return (self.reason or "").startswith(IMPOSSIBLE)

    @property
    def worst(self) -> float | None:
        """The largest loss in the adjusted interval, as a positive number; negative if a gain is certain."""
        end = self.high_adj if self.lower else self.low_adj
        return None if end is None else end if self.lower else -end


@dataclass(frozen=True)
class Effect:
    """A cell of the interference matrix: the score of one brick alone minus the base's, on one task."""

    brick: str
    task: str
    diff: float | None
    low: float | None
    high: float | None
    verdict: str | None


@dataclass(frozen=True)
class CheckView:
    """A check of a scorer against lm-eval's own on some documents of a suite, with differences in nats.

    `whole` names the configuration whose whole check counts for this one; None for a whole check.
    """

    suite: str
    scorer: str
    documents: int | None
    max_difference: float | None
    tolerance: float | None
    spread: float | None
    whole: str | None = None

    @property
    def passed(self) -> bool | None:
        """True if the largest difference is within the tolerance; None if one of the two is not known."""
        if self.max_difference is None or self.tolerance is None:
            return None
        return self.max_difference <= self.tolerance


@dataclass(frozen=True)
class ConfigurationView:
    """A scored configuration.

    Attributes:
        kept: Its chance-corrected score divided by the best parent's, by task; without a value if the parent is too close to chance.
        roles: Its role and the roles of its aliases: a recipe can also be the plain average.
        parameters: Number of parameters.
        bytes: Size of the weights as a checkpoint.
        bricks: Bytes by brick.
        axes: Brick -> axis -> value.
        checks: One for each suite whose scorer was checked.
        forgetting: Mean over the retention tasks, configuration minus base.
        costs: The document's entry of that name; in older documents only the time of scoring.
    """

    name: str
    role: str
    digest: str
    parents: tuple[str, ...]
    recipe: str | None
    recipe_text: str | None
    seconds: float | None
    mean: Estimate | None
    kept_mean: Estimate | None
    kept: dict[str, Estimate]
    scores: dict[str, Estimate]
    aliases: tuple[str, ...]
    parameters: int | None = None
    bytes: int | None = None
    bricks: Mapping[str, int | None] = field(default_factory=dict)
    axes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    checks: tuple[CheckView, ...] = ()
    forgetting: Effect | None = None
    roles: tuple[str, ...] = ()
    costs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_control(self) -> bool:
        """True for the base, a brick alone, an average, and another way to teach an edit's facts."""
        return self.role != "configuration"


@dataclass(frozen=True)
class View:
    """Everything that the pages show.

    Attributes:
        rows: All differences.
        differences: Differences of primary metrics, by configuration and task.
        families: Number of comparisons by family, in the order compared, guarded, controls; empty in older documents.
        margin: Smallest effect of interest, if known.
        effects: The interference matrix, by brick and task.
        recommendation: The document's entry of that name; None in older documents and if only controls are compared.
        sweeps: The document's entries of that name.
    """

    baseline: str
    tasks: tuple[TaskView, ...]
    configurations: tuple[ConfigurationView, ...]
    rows: tuple[DifferenceView, ...]
    differences: dict[tuple[str, str], DifferenceView]
    alpha: float
    correction: str
    family: str
    family_size: int | None
    families: Mapping[str, int]
    margin: float | None
    bricks: tuple[str, ...]
    effect_tasks: tuple[str, ...]
    effects: dict[tuple[str, str], Effect]
    provenance: Mapping[str, Any]
    warnings: tuple[str, ...]
    recommendation: Mapping[str, Any] | None = None
    sweeps: tuple[Mapping[str, Any], ...] = ()

    @property
    def controls(self) -> tuple[ConfigurationView, ...]:
        """The base, bricks alone, averages, and other ways to teach an edit's facts."""
        return tuple(c for c in self.configurations if c.is_control)

    @property
    def axes(self) -> dict[str, Mapping[str, str]]:
        """Brick -> axis -> value, for the bricks of all configurations whose axes are known."""
        return {brick: axes for c in self.configurations for brick, axes in c.axes.items()}

    @property
    def axis_names(self) -> list[str]:
        """Names of the axes, in the order of the cards."""
        return list(dict.fromkeys(name for axes in self.axes.values() for name in axes))

    @property
    def named(self) -> tuple[ConfigurationView, ...]:
        """Configurations that are not controls."""
        return tuple(c for c in self.configurations if not c.is_control)

    @property
    def by_mean(self) -> tuple[ConfigurationView, ...]:
        """Named configurations, the highest mean over skills first; those without a mean come last, in the document's order."""
        return tuple(
            sorted(self.named, key=lambda c: -math.inf if c.mean is None or c.mean.value is None else c.mean.value, reverse=True)
        )

    @property
    def judged(self) -> tuple[ConfigurationView, ...]:
        """Named configurations other than the baseline."""
        return tuple(c for c in self.named if c.name != self.baseline)

    @property
    def undecided(self) -> tuple[DifferenceView, ...]:
        """Differences of named configurations with the verdict "cannot tell" or "not shown safe"."""
        differences = (d for c in self.judged for d in self.compared(c.name, self.tasks))
        return tuple(d for d in differences if d.word in OPEN)

    @property
    def withheld(self) -> tuple[tuple[str, str, str], ...]:
        """Ratios to a parent that are withheld, as (configuration, task, reason)."""
        ratios = ((c.name, task, e.reason) for c in self.configurations for task, e in c.kept.items())
        return tuple((name, task, reason) for name, task, reason in ratios if reason)

    @property
    def guarded(self) -> tuple[TaskView, ...]:
        """Tasks that must not get worse."""
        return tuple(t for t in self.tasks if t.guarded)

    @property
    def tolerated(self) -> bool:
        """True if a guarded task has a tolerance, which forest plots draw."""
        return any(t.tolerance is not None for t in self.guarded)

    @property
    def words(self) -> tuple[str, ...]:
        """The verdict words of this comparison, with those of guarded tasks only if such tasks were tested."""
        return VERDICTS if self.harm_tested else tuple(w for w in VERDICTS if w not in GUARD_WORDS)

    @property
    def harm_tested(self) -> bool:
        """True if some verdicts are about harm."""
        return any(row.guarded for row in self.rows)

    @property
    def partial(self) -> str | None:
        """The warning that only some items were scored; None if all were."""
        return next((w for w in self.warnings if w.startswith("Partial")), None)

    def configuration(self, name: str) -> ConfigurationView | None:
        """Return the configuration of this name, or None."""
        return next((c for c in self.configurations if c.name == name), None)

    def task(self, name: str) -> TaskView | None:
        """Return the task of this name, or None."""
        return next((t for t in self.tasks if t.name == name), None)

    @property
    def retention(self) -> tuple[TaskView, ...]:
        """Tasks that test what the base could do before."""
        return tuple(t for t in self.tasks if t.role == "retention")

    def compared(self, name: str, tasks: Iterable[TaskView]) -> list[DifferenceView]:
        """Return one configuration's differences on these tasks, without tasks on which it was not scored."""
        differences = (self.differences.get((name, t.name)) for t in tasks)
        return [d for d in differences if d is not None]

    def unit(self, task: str, metric: str | None = None) -> Unit:
        """Return the unit of a task's scores; a secondary metric has its own."""
        named = next((t for t in self.tasks if t.name == task), None)
        if named is not None and metric in (None, named.metric):
            return named.unit
        return unit_of([r for r in self.rows if r.task == task and r.metric == metric])


def verdict_word(verdict: str | None) -> str | None:
    """Return the verdict word at the beginning of a verdict, or None."""
    return next((w for w in VERDICTS if (verdict or "").startswith(w)), None)


def unit_of(rows: Iterable[DifferenceView], lower: bool = False, ratio: str | None = None) -> Unit:
    """Return percentage points for shares (all scores between 0 and 1, higher is better), else the metric's own unit."""
    differences = list(rows)
    levels = [v for r in differences for v in (r.value, r.baseline_value) if v is not None]
    if lower or ratio or any(r.lower or r.ratio for r in differences) or not all(0 <= v <= 1 for v in levels):
        return raw(max((abs(v) for v in levels), default=0.0), RATIO_WORDS.get(ratio or "", ""))
    return POINTS
