"""What the pages show, as typed objects; `reading` makes them of the comparison document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.report.numbers import MINUS, POINTS, Unit, raw

ROLES = ("configuration", "base", "brick", "average")
RATIO_WORDS = {"bits_per_byte": "bits per byte"}
VERDICTS = ("better", "worse", "equivalent", "cannot tell", "safe", "not shown safe", "no item changed")
GUARD_WORDS = ("safe", "not shown safe")
"""What is said of guarded tasks alone; "worse" and "no item changed" are said of all tasks."""
OPEN = ("cannot tell", "not shown safe")
"""Verdicts that more items could decide."""


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
    """A row of tasks: a task under its primary metric, or a contrast of two tasks.

    Attributes:
        lower: Lower is better.
        ratio: Kind of a metric over the whole corpus, such as bits_per_byte; None for a mean over items.
        contrast: The two tasks whose difference this is.
        min_effect: Smallest difference of interest, in the metric's own units; None where the suite gives none.
        uncorrected: The score of guessing is not known, so that means take the score as it is.
        tolerance: Largest loss on a guarded task that is safe, in the metric's own units; None where the suite or an older document gives none.
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
        """Whether the task must not get worse."""
        return self.role in ("retention", "guarded")

    @property
    def axis(self) -> str:
        """Tasks of one axis are drawn on one scale and tinted alike: shares by role, anything else by itself."""
        return self.role if self.unit == POINTS and self.contrast is None else self.name

    @property
    def measure(self) -> str:
        """The metric in words, with what is subtracted in a contrast."""
        parts = [self.metric]
        if self.contrast is not None:
            parts.append(f"{self.contrast[0]} {MINUS} {self.contrast[1]}")
        return ", ".join(p for p in parts if p)


@dataclass(frozen=True)
class CompanionView:
    """The difference of a second, continuous metric with a plain 95 % interval; it decides no verdict."""

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
        """One of the verdict words; the document may add to it, as in "cannot tell (few clusters)"."""
        return verdict_word(self.verdict)

    @property
    def guarded(self) -> bool:
        """Whether the verdict is about harm: safe, worse or not shown safe. It is not in older documents."""
        return self.family == "guarded"

    @property
    def apart(self) -> bool:
        """Whether the row was tested among the controls, apart from the configurations that were asked about."""
        return self.family == "controls" or (self.guarded and self.role != "configuration")

    @property
    def impossible(self) -> bool:
        """Whether no data on these items could have decided the row within its family."""
        return (self.reason or "").startswith("no verdict can fall")

    @property
    def worst(self) -> float | None:
        """The largest loss that the adjusted interval leaves, as a positive number; below 0 where a gain is certain."""
        end = self.high_adj if self.lower else self.low_adj
        return None if end is None else end if self.lower else -end


@dataclass(frozen=True)
class Effect:
    """A cell of the interference matrix: one brick alone minus the base on one task."""

    brick: str
    task: str
    diff: float | None
    low: float | None
    high: float | None
    verdict: str | None


@dataclass(frozen=True)
class CheckView:
    """A scorer beside lm-eval's own on some documents of a suite: log-probabilities in nats."""

    suite: str
    scorer: str
    documents: int | None
    max_difference: float | None
    tolerance: float | None
    spread: float | None

    @property
    def passed(self) -> bool | None:
        """Whether the largest difference is within the tolerance; None where one of them is not known."""
        if self.max_difference is None or self.tolerance is None:
            return None
        return self.max_difference <= self.tolerance


@dataclass(frozen=True)
class ConfigurationView:
    """A scored configuration.

    Attributes:
        kept: Its share of the best parent's chance-corrected score; without a value where the parent is too near to chance.
        roles: Its role, and those that it has under its aliases: a recipe may be the plain average too.
        parameters: Number of parameters; bytes: of the weights as they would be written; bricks: bytes by brick.
        checks: One for each suite whose scorer was checked.
        forgetting: Mean over the retention tasks, configuration minus base.
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
    checks: tuple[CheckView, ...] = ()
    forgetting: Effect | None = None
    roles: tuple[str, ...] = ()

    @property
    def is_control(self) -> bool:
        return self.role != "configuration"


@dataclass(frozen=True)
class View:
    """Everything that the pages show.

    `rows` holds all differences, `differences` those of primary metrics by (configuration, task); `effects`
    holds the interference matrix by (brick, task). `margin` is the smallest effect of interest, where known. `families` holds the
    number of rows by family, in the order compared, guarded, controls; empty in documents of before.
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

    @property
    def controls(self) -> tuple[ConfigurationView, ...]:
        return tuple(c for c in self.configurations if c.is_control)

    @property
    def named(self) -> tuple[ConfigurationView, ...]:
        return tuple(c for c in self.configurations if not c.is_control)

    @property
    def judged(self) -> tuple[ConfigurationView, ...]:
        """Named configurations other than the baseline."""
        return tuple(c for c in self.named if c.name != self.baseline)

    @property
    def undecided(self) -> tuple[DifferenceView, ...]:
        """Differences of named configurations that these items cannot tell, or do not show to be safe."""
        found = (d for c in self.judged for d in self.compared(c.name, self.tasks))
        return tuple(d for d in found if d.word in OPEN)

    @property
    def withheld(self) -> tuple[tuple[str, str, str], ...]:
        """Ratios to a parent that are not given: configuration, task, reason."""
        found = ((c.name, task, e.reason) for c in self.configurations for task, e in c.kept.items())
        return tuple((name, task, reason) for name, task, reason in found if reason)

    @property
    def guarded(self) -> tuple[TaskView, ...]:
        """Tasks that must not get worse."""
        return tuple(t for t in self.tasks if t.guarded)

    @property
    def tolerated(self) -> bool:
        """Whether some guarded task has a tolerance, which forest plots draw."""
        return any(t.tolerance is not None for t in self.guarded)

    @property
    def words(self) -> tuple[str, ...]:
        """The verdict words of this comparison: those of guarded tasks only where such tasks were tested."""
        return VERDICTS if self.harm_tested else tuple(w for w in VERDICTS if w not in GUARD_WORDS)

    @property
    def harm_tested(self) -> bool:
        """Whether some verdicts are about harm."""
        return any(row.guarded for row in self.rows)

    @property
    def partial(self) -> str | None:
        """The warning that items were cut, None where all were scored."""
        return next((w for w in self.warnings if w.startswith("Partial")), None)

    def configuration(self, name: str) -> ConfigurationView | None:
        return next((c for c in self.configurations if c.name == name), None)

    def task(self, name: str) -> TaskView | None:
        return next((t for t in self.tasks if t.name == name), None)

    @property
    def retention(self) -> tuple[TaskView, ...]:
        return tuple(t for t in self.tasks if t.role == "retention")

    def compared(self, name: str, tasks: Iterable[TaskView]) -> list[DifferenceView]:
        """Differences of one configuration on these tasks; tasks it was not scored on are left out."""
        found = (self.differences.get((name, t.name)) for t in tasks)
        return [d for d in found if d is not None]

    def unit(self, task: str, metric: str | None = None) -> Unit:
        """Unit of a task's scores; a secondary metric has its own."""
        named = next((t for t in self.tasks if t.name == task), None)
        if named is not None and metric in (None, named.metric):
            return named.unit
        return unit_of([r for r in self.rows if r.task == task and r.metric == metric])


def verdict_word(verdict: str | None) -> str | None:
    """The verdict word that a verdict begins with, None for anything else."""
    return next((w for w in VERDICTS if (verdict or "").startswith(w)), None)


def unit_of(rows: Iterable[DifferenceView], lower: bool = False, ratio: str | None = None) -> Unit:
    """Percent and points for shares (all scores between 0 and 1, higher is better), else the metric's own unit."""
    found = list(rows)
    levels = [v for r in found for v in (r.value, r.baseline_value) if v is not None]
    if lower or ratio or any(r.lower or r.ratio for r in found) or not all(0 <= v <= 1 for v in levels):
        return raw(max((abs(v) for v in levels), default=0.0), RATIO_WORDS.get(ratio or "", ""))
    return POINTS
