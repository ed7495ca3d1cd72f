"""The result of a comparison: rows, configurations, tasks and everything else that `report` shows and writes as JSON.

Numbers are in the metrics' units, and infinite or undefined ones are null. How they are shown is the page's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

from workbench.compare.answers import Question, SideBySide
from workbench.compare.configurations import KEYS, ComparedConfiguration, ConfigurationCosts
from workbench.compare.differences import GUARD_VERDICTS, OPEN_VERDICTS, VERDICTS, Difference, Interference, Verdict
from workbench.compare.recommend import Recommendation
from workbench.compare.routing import RoutingComparison
from workbench.compare.survival import EditedFacts
from workbench.compare.sweeps import ComparedSweep
from workbench.ground.results import JsonObject, Number, Result, absent
from workbench.scores.documents import Skipped
from workbench.scores.groups import GroupScore
from workbench.scores.suite import Contrast

SHOWN_ORDER = ("configuration", "base", "brick", "average", "memory", "finetune", "adapter")
"""Order in which pages show configurations by role."""


class ComparedTask(JsonObject):
    """A task under its primary metric, or a contrast of two tasks."""

    task: str
    """Name of the task or contrast."""
    metric: str
    """Primary metric."""
    n: int
    """Number of items."""
    clusters: int
    """Number of clusters."""
    chance: Number | None
    """Chance score; null if it is not known, so that means use the score as it is."""
    role: str
    """skill, retention, guarded or other."""
    owner: str | None
    """Brick that teaches the task."""
    suite: str
    """Name of its suite."""
    plan: str
    """Digest of the plan under which it was scored."""
    lower: bool
    """Whether lower is better."""
    ratio: str | None
    """Kind of a metric over the whole corpus, such as bits_per_byte; null for a mean over items."""
    share: bool = True
    """Whether scores of items lie in [0, 1], or in [-1, 1] for a contrast."""
    min_effect: Number | None = None
    """Smallest difference of interest, in the metric's units; null if the suite sets none."""
    tolerance: Number | None
    """Largest loss on a guarded task that counts as safe, in the metric's units."""
    scorer: str | None
    """Scorer that computed the log-likelihoods."""
    contrast: Subtraction | None
    """The two tasks, for a contrast."""

    @property
    def name(self) -> str:
        """Name of the task or contrast."""
        return self.task

    @property
    def guarded(self) -> bool:
        """True if the task must not get worse."""
        return self.role in ("retention", "guarded")

    @property
    def measure(self) -> str:
        """The metric's name, and for a contrast the subtraction."""
        minus = f", {self.contrast.of} \N{MINUS SIGN} {self.contrast.minus}" if self.contrast else ""
        return self.metric + minus


class Subtraction(JsonObject):
    """The two tasks of a contrast."""

    of: str
    """Task of the suite."""
    minus: str
    """Task whose scores are subtracted."""

    @classmethod
    def by(cls, contrast: Contrast | None) -> Subtraction | None:
        """Return the two tasks of a suite's contrast."""
        return cls(of=contrast.of, minus=contrast.minus) if contrast else None


class Family(JsonObject):
    """The families of comparisons that were declared before any test."""

    size: int
    """Number of rows of the main family."""
    alpha: Number
    """Error rate of a family."""
    correction: Literal["max-t", "none"]
    """Correction for multiple comparisons."""
    min_effect: Number | None
    """Smallest difference of interest, for shares."""
    looked_at: int = 0
    """Number of configurations that were scored on the same items and are not shown."""
    text: str
    """Description."""
    compared: int = 0
    """Number of rows of named configurations on tasks that are not guarded."""
    guarded: int = 0
    """Number of rows on guarded tasks."""
    controls: int = 0
    """Number of rows of controls on the other tasks."""


class StoredAnswer(JsonObject):
    """A configuration's answer to an item, as it is stored."""

    response: str | None
    """Generated text."""
    metrics: dict[str, Number | list[Number]]
    """Metric -> score."""
    loglikelihoods: list[Number] | None
    """Log-likelihoods of the choices, in nats."""


class ChangedItem(Question):
    """An item whose score differs from the baseline's, with both answers."""

    baseline: StoredAnswer
    """Answer of the baseline."""
    configuration: StoredAnswer
    """Answer of the configuration."""


class Provenance(JsonObject):
    """What a comparison was made from."""

    suites: list[str]
    """Names of the suites."""
    plans: list[str]
    """Digests of the plans."""
    scorers: dict[str, str | None] = {}
    """Suite -> scorer of log-likelihoods."""
    versions: dict[str, str]
    """Library -> version."""
    device: str
    """Devices of the scoring."""
    command: str
    """Command line that makes the comparison again."""
    created: str
    """Time of the comparison (ISO 8601, UTC)."""


class _OfSuite(JsonObject):
    suite: str
    """Name of the suite."""
    configuration: str
    """Name of the configuration."""


class ComparedGroup(GroupScore, _OfSuite):
    """The mean of a metric over the tasks of a group."""


class Comparison(Result):
    """A comparison of stored scores with a baseline."""

    version: int = 1
    """Version of the format."""
    baseline: str
    """Name of the baseline."""
    rows: tuple[Difference, ...]
    """One row for each configuration and each task or contrast."""
    configurations: list[ComparedConfiguration]
    """The configurations, controls first."""
    tasks: list[ComparedTask]
    """The tasks, then the contrasts."""
    interference: Interference
    """Differences of each brick alone from the base."""
    facts: list[EditedFacts] = []
    """Scores of edited facts, one entry for each facts file."""
    family: Family
    """The families of comparisons."""
    flips: dict[str, list[ChangedItem]] = {}
    """Configuration -> items whose score differs from the baseline's."""
    side_by_side: SideBySide = SideBySide(items=[], answers={}, differing=0, left_out=0)
    """Answers of all configurations to items on which two of them differ."""
    provenance: Provenance
    """What it was made from."""
    groups: list[ComparedGroup] | None = absent()
    """Aggregates over groups of tasks, if a suite lists a group."""
    sweeps: list[ComparedSweep] | None = absent()
    """Sweeps among the configurations, if there are any."""
    routing: RoutingComparison | None = absent()
    """Which bricks answered in routed configurations, if there are any."""
    recommendation: Recommendation | None = absent()
    """The configuration to ship and why; absent if only controls are compared."""
    warnings: list[str]
    """What a reader should know."""
    left_out: list[Skipped] | None = absent()
    """Configurations that were skipped, if there are any."""

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Add what the comparison in the result of an older search lacks."""
        missing = dict.fromkeys(KEYS[1:], "the comparison was made by an earlier version")
        unknown = {**dict.fromkeys([*KEYS, "length_unit", "peak_of"]), "resumed": False, "licences": {}, "missing": missing}
        effect = data.get("family", {}).get("min_effect")
        return {
            **data,
            "configurations": [
                {"roles": [c.get("role")], "costs": {**unknown, "seconds": c.get("seconds")}, **c}
                for c in data.get("configurations", ())
            ],
            "tasks": [{"min_effect": effect, **t} for t in data.get("tasks", ())],
        }

    def warned(self, warnings: Iterable[str], left_out: list[Skipped] | None = None) -> Comparison:
        """Return the comparison with further warnings, and with what was left out."""
        return self.model_copy(update={"warnings": [*self.warnings, *warnings], "left_out": left_out or None})

    @property
    def worse(self) -> list[Difference]:
        """Rows in which a configuration other than a control is worse than the baseline."""
        return [row for row in self.rows if row.verdict == "worse" and row.role == "configuration"]

    @property
    def not_safe(self) -> list[Difference]:
        """Rows of guarded tasks in which a configuration other than a control is worse or not shown safe."""
        guarded = [row for row in self.rows if row.role == "configuration" and row.guarded]
        return [row for row in guarded if row.verdict in ("worse", "not shown safe")]

    @cached_property
    def by_role(self) -> tuple[ComparedConfiguration, ...]:
        """All configurations as pages show them: named ones, base, bricks, averages, other controls."""
        return tuple(sorted(self.configurations, key=lambda c: SHOWN_ORDER.index(c.role)))

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """Rows by configuration and task."""
        return {(row.configuration, row.task): row for row in self.rows}

    @cached_property
    def levels(self) -> dict[str, list[float]]:
        """Task -> all scores in its rows."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            found.setdefault(row.task, []).extend(v for v in (row.value, row.baseline_value) if v is not None)
        return found

    @property
    def controls(self) -> tuple[ComparedConfiguration, ...]:
        """The base, bricks alone, averages, and other ways to teach an edit's facts."""
        return tuple(c for c in self.by_role if c.is_control)

    @property
    def named(self) -> tuple[ComparedConfiguration, ...]:
        """Configurations that are not controls."""
        return tuple(c for c in self.by_role if not c.is_control)

    @property
    def by_mean(self) -> tuple[ComparedConfiguration, ...]:
        """Named configurations, the highest mean over skills first; those without a mean come last."""
        return tuple(sorted(self.named, key=lambda c: c.level, reverse=True))

    @property
    def judged(self) -> tuple[ComparedConfiguration, ...]:
        """Named configurations other than the baseline."""
        return tuple(c for c in self.named if c.name != self.baseline)

    @property
    def axes(self) -> dict[str, Mapping[str, str]]:
        """Brick -> axis -> value, for the bricks of all configurations whose axes are known."""
        return {brick: axes for c in self.by_role for brick, axes in c.axes.items()}

    @property
    def axis_names(self) -> list[str]:
        """Names of the axes, in the order of the cards."""
        return list(dict.fromkeys(name for axes in self.axes.values() for name in axes))

    @property
    def tolerated(self) -> bool:
        """True if a guarded task has a tolerance, which forest plots draw."""
        return any(t.tolerance is not None for t in self.guarded)

    @property
    def undecided(self) -> tuple[Difference, ...]:
        """Differences of named configurations with the verdict "cannot tell" or "not shown safe"."""
        rows = (d for c in self.judged for d in self.compared(c.name, self.tasks))
        return tuple(d for d in rows if d.verdict in OPEN_VERDICTS)

    @property
    def withheld(self) -> tuple[tuple[str, str, str], ...]:
        """Ratios to a parent that are withheld, as (configuration, task, reason)."""
        ratios = ((c.name, task, kept.reason) for c in self.by_role for task, kept in c.kept.items())
        return tuple((name, task, reason) for name, task, reason in ratios if reason)

    @property
    def guarded(self) -> tuple[ComparedTask, ...]:
        """Tasks that must not get worse."""
        return tuple(t for t in self.tasks if t.guarded)

    @property
    def retention(self) -> tuple[ComparedTask, ...]:
        """Tasks that test what the base could do before."""
        return tuple(t for t in self.tasks if t.role == "retention")

    @property
    def harm_tested(self) -> bool:
        """True if some verdicts are about harm."""
        return any(row.guarded for row in self.rows)

    @property
    def words(self) -> tuple[Verdict, ...]:
        """The verdicts of this comparison, with those of guarded tasks only if such tasks were tested."""
        return VERDICTS if self.harm_tested else tuple(w for w in VERDICTS if w not in GUARD_VERDICTS)

    @property
    def partial(self) -> str | None:
        """The warning that only some items were scored; None if all were."""
        return next((w for w in self.warnings if w.startswith("Partial")), None)

    def configuration(self, name: str) -> ComparedConfiguration | None:
        """Return the configuration of this name, or None."""
        return next((c for c in self.configurations if c.name == name), None)

    def task(self, name: str) -> ComparedTask | None:
        """Return the task of this name, or None."""
        return next((t for t in self.tasks if t.name == name), None)

    def compared(self, name: str, tasks: Iterable[ComparedTask]) -> list[Difference]:
        """Return one configuration's differences on these tasks, without tasks on which it was not scored."""
        rows = (self.differences.get((name, t.name)) for t in tasks)
        return [d for d in rows if d is not None]

    def costs(self, pair: tuple[str, str] | None = None) -> list[ConfigurationCosts]:
        """Return the costs of the configurations that the rows name, and of the baseline; or those of a pair."""
        names = set(pair or ()) or {self.baseline, *(row.configuration for row in self.rows)}
        return [ConfigurationCosts(configuration=c.name, **dict(c.costs)) for c in self.configurations if c.name in names]


class ComparedRows(JsonObject):
    """Comparison of stored scores with a baseline."""

    baseline: str
    """Name of the baseline."""
    rows: list[Difference]
    """One row for each configuration and each task or contrast."""
    costs: list[ConfigurationCosts]
    """Costs of the compared configurations: length of answers, time and memory of scoring, licenses."""
    recommendation: Recommendation | None = absent()
    """The recommendation says which configuration to ship and why. It is absent if only controls are compared."""
    sweeps: list[ComparedSweep] | None = absent()
    """Sweeps among the configurations, if there are any."""
    routing: RoutingComparison | None = absent()
    """Which bricks answered in routed configurations, if there are any."""
    left_out: list[Skipped] | None = absent()
    """Configurations that were skipped, if there are any."""

    @classmethod
    def of(
        cls, whole: Comparison, two: Comparison, pair: tuple[str, str] | None = None, left_out: list[Skipped] | None = None
    ) -> ComparedRows:
        """Return what `compare` prints.

        Args:
            whole: The comparison of all configurations.
            two: The comparison with the first one of the pair, or the same.
            pair: The two configurations that are asked for; None for all.
            left_out: Configurations that were skipped.
        """
        return cls(
            baseline=two.baseline,
            rows=[row for row in two.rows if pair is None or row.configuration == pair[1]],
            costs=two.costs(pair),
            recommendation=whole.recommendation,
            sweeps=whole.sweeps,
            routing=whole.routing,
            left_out=left_out or None,
        )
