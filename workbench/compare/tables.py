"""Tables of stored scores for a comparison: one table per task, with all configurations on the same items."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError

from workbench.facts.facts import ACCURACIES, WRITTEN
from workbench.ground.errors import WorkbenchError, nearest
from workbench.scores.documents import rescore_hint
from workbench.scores.files import gold_of, margin_of
from workbench.scores.paired import Paired, Ratio, paired_scores
from workbench.scores.plan import PlanRecord
from workbench.scores.statistics import RATIOS, SHARED_RANGE, Floats, codes, effective_clusters, interval, resampled_means, score
from workbench.scores.store import DESIGN_ORDER, Configuration, Row, Scores, ScoreStore
from workbench.scores.suite import MARGIN, Contrast, Suite, metric_of, reach_of


@dataclass(frozen=True)
class Table:
    """Scores of all configurations on a task or a contrast, in the order of `items`.

    Attributes:
        kind: lm-eval's output type; empty for a contrast.
        values: Scores of the items by configuration digest; numerators for a ratio of sums, contributions for a metric of a whole corpus.
        rows: Stored rows of the items by configuration digest; empty for a contrast.
        weights: Weights of the items, for a ratio of sums.
        ratio: Kind of ratio of sums, or lm-eval's aggregation of a whole corpus; None for means over items.
        lower: Lower is better.
        contrast: The two tasks, for a contrast.
        scorer: Scorer that computed the log-likelihoods, if the plan records it.
    """

    name: str
    metric: str
    suite: Suite
    plan: str
    items: Sequence[Row]
    cluster: NDArray[np.intp]
    values: Mapping[str, Floats]
    rows: Mapping[str, Sequence[Row]]
    kind: str = ""
    lower: bool = False
    ratio: str | None = None
    weights: Floats | None = None
    contrast: Contrast | None = None
    scorer: str | None = None

    @property
    def task(self) -> str:
        """Name of the task or contrast in its suite; `name` also says the suite, if another one has a task of the same name."""
        return self.name.removesuffix(f" ({self.suite.suite})")

    @cached_property
    def chance(self) -> float | None:
        """Chance score: the suite's value, else that of guessing among the items' choices, else 0; None if it is not known."""
        declared = self.suite.chance.get(self.task)
        if declared is not None or self.kind != "multiple_choice" or not self.correctable:
            return declared or 0.0
        if metric_of(self.metric) == WRITTEN:
            return 0.0
        binary = all(np.isin(values, (0.0, 1.0)).all() for values in self.values.values())
        return guessing(self.items) if binary and metric_of(self.metric) in ACCURACIES else None

    @property
    def span(self) -> float:
        """Distance from the chance score to 1, by which corrected scores are divided; 1 if chance is not known."""
        return 1 - (self.chance or 0.0)

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.cluster.max()) + 1

    @cached_property
    def effective(self) -> float:
        """Effective number of clusters: (sum of sizes)^2 / sum of squared sizes."""
        return effective_clusters(np.bincount(self.cluster))

    @property
    def skill(self) -> bool:
        """True if the task counts for the mean over skills and for kept skill."""
        return self.suite.role_of(self.task) == "skill" and self.correctable

    @property
    def correctable(self) -> bool:
        """True if scores lie in [0, 1] and higher is better, so that they can be corrected for chance and averaged with others."""
        return self.share and not self.lower and self.contrast is None

    @cached_property
    def share(self) -> bool:
        """True if scores of items lie in [0, 1], or for a contrast in [-1, 1]."""
        if self.ratio is not None or self.metric == MARGIN:
            return self.ratio in SHARED_RANGE
        lowest = -1.0 if self.contrast else 0.0
        return all(v.min() >= lowest and v.max() <= 1 for v in self.values.values())

    @property
    def min_effect(self) -> float | None:
        """Smallest difference of interest, in the metric's units."""
        return self.suite.min_effect_of(self.task, share=self.share)

    @property
    def guarded(self) -> bool:
        """True if the verdict is about harm: safe, worse or not shown safe."""
        return self.suite.guards(self.task)

    @property
    def tolerance(self) -> float | None:
        """Largest loss on a guarded task that counts as safe, in the metric's units."""
        return self.suite.tolerance_of(self.task, share=self.share)

    def value(self, digest: str) -> float:
        """Return the metric of one configuration."""
        return score(self.ratio, self.values[digest], self.weights)

    def interval(self, digest: str) -> tuple[float, float]:
        """Return the 95 % interval of the metric."""
        return interval(self.ratio, self.values[digest], self.cluster, self.weights)

    def paired(self, base: str, digest: str, *, drawn: bool = False) -> Paired | Ratio:
        """Compare a configuration with the baseline item by item; with `drawn`, by what the suite says was drawn: clusters or items."""
        cluster = None if drawn and self.suite.draws_items(self.task) else self.cluster
        span = 2.0 if self.contrast and self.share else None
        worst = self.suite.worst_of(self.task, share=self.share)
        before, after = self.values[base], self.values[digest]
        return paired_scores(self.ratio, before, after, cluster, self.weights, span=span, reach=self.reach, worst=worst)

    @cached_property
    def reach(self) -> float:
        """The largest change of an item that the metric declares; 0 if it declares none."""
        if not self.contrast:
            return reach_of(self.metric, *self.values.values())
        return 2 * reach_of(self.metric, *(np.abs(values) for values in self.values.values()))

    @cached_property
    def margins(self) -> dict[str, Floats]:
        """Margins of the gold choices in nats, by digest and item; empty if the task has no choices or a gold choice is not known."""
        if self.kind != "multiple_choice":
            return {}
        margins = {d: [margin_of(row, item) for row, item in zip(rows, self.items, strict=True)] for d, rows in self.rows.items()}
        if any(m is None or not math.isfinite(m) for values in margins.values() for m in values):
            return {}
        return {digest: np.array(values, np.float64) for digest, values in margins.items()}

    def corrected(self, score: Any) -> Any:
        """Return (score - chance) / (1 - chance), or the score itself if chance is not known."""
        return (score - (self.chance or 0.0)) / self.span

    @property
    def seed(self) -> int:
        """Seed of the resampled clusters."""
        return xxhash.xxh3_64_intdigest(f"{self.plan}/{self.task}".encode())

    @cached_property
    def resampled(self) -> dict[str, Floats]:
        """Chance-corrected means under resampled clusters, with the same draws for all configurations."""
        means = resampled_means(np.stack(list(self.values.values())), self.cluster, seed=self.seed)
        return dict(zip(self.values, self.corrected(means), strict=True))


def guessing(items: Sequence[Row]) -> float | None:
    """Return the expected score of guessing, the mean over items of the share of right choices; None if an item has none or all are right.

    An item without a gold choice counts as having one right choice.
    """
    shares = []
    for item in items:
        choices, right = item.get("choices"), gold_of(item)
        if not choices:
            return None
        shares.append(sum(0 <= g < len(choices) for g in right) / len(choices) if right else 1 / len(choices))
    expected = float(np.mean(shares)) if shares else 1.0
    return expected if expected < 1 else None


def suites_of(store: ScoreStore, scores: Sequence[Scores], overrides: Mapping[str, Suite]) -> dict[str, Suite]:
    """Return the suites by name; raise WorkbenchError if one of them was scored under two plans."""
    plans: dict[str, str] = {}
    for s in scores:
        if plans.setdefault(s.suite, s.plan) != s.plan:
            raise WorkbenchError(
                f"suite '{s.suite}': '{s.configuration.name}' was scored under plan {s.plan[:12]}, other configurations under plan "
                f"{plans[s.suite][:12]}: tasks, data, tokenizer, limit or settings differ, so the scores are not comparable",
                "Score all configurations again with the same suite, limit and batch size.",
            )
    return {s.suite: overrides.get(s.suite) or _suite_of(store, s) for s in scores}


def _suite_of(store: ScoreStore, scores: Scores) -> Suite:
    """Return the suite stored in plan.json."""
    try:
        suite = Suite.model_validate(store.record(scores).suite)
    except ValidationError as error:
        path, first = store.folder(scores.suite, scores.plan) / "plan.json", error.errors()[0]
        raise WorkbenchError(f"{path}: suite: {'.'.join(map(str, first['loc']))}: {first['msg']}", rescore_hint(path)) from error
    return suite


def configurations_of(scores: Sequence[Scores], baseline: str) -> list[list[Scores]]:
    """Return the scores of each configuration over all suites, in design order; equal digests are one configuration.

    A configuration has the name of its first recipe or model; other recipes, and bricks and averages scored as controls, become its
    aliases. The base and the control named `baseline` stay separate from a recipe with their weights, because differences are computed
    against them.
    """
    configuration_digests = {s.configuration.digest for s in scores if s.configuration.role == "configuration"}
    by_weights: dict[tuple[str, bool], list[Scores]] = {}
    for s in sorted(scores, key=_order):
        c = s.configuration
        separate = c.digest in configuration_digests and (c.role == "base" or (c.role != "configuration" and c.name == baseline))
        entry = by_weights.setdefault((c.digest, separate), [])
        twin = next((i for i, other in enumerate(entry) if other.suite == s.suite), None)
        if twin is None:
            entry.append(s)
        elif c.name not in entry[twin].names:
            entry[twin] = entry[twin].also(c)
    entries = sorted(by_weights.values(), key=lambda entry: DESIGN_ORDER.index(entry[0].configuration.role))
    names: dict[str, str] = {}
    for s, *_ in entries:
        c = s.configuration
        if names.setdefault(c.name, c.digest) != c.digest:
            raise WorkbenchError(
                f"two configurations are called '{c.name}': {names[c.name][:12]} and {c.digest[:12]}",
                "Rename one of them.",
            )
    return entries


def _order(scores: Scores) -> int:
    """Return the priority of a name among equal weights: base, recipe or model, then the other controls."""
    role = scores.configuration.role
    return ("base", "configuration").index(role) if role in ("base", "configuration") else 2 + DESIGN_ORDER.index(role)


def named(entries: Sequence[Sequence[Scores]], name: str) -> Configuration:
    """Return the configuration with a name, or else with this alias; raise WorkbenchError if there is none."""
    for entry in sorted(entries, key=lambda e: e[0].configuration.name != name):
        if name in {n for s in entry for n in s.names}:
            return entry[0].configuration
    raise WorkbenchError(
        f"baseline '{name}' is not among the scored configurations", nearest(name, [e[0].configuration.name for e in entries])
    )


def tables_of(store: ScoreStore, scores: Sequence[Scores], suites: Mapping[str, Suite]) -> list[Table]:
    """Read all per-item scores into one table per task, then one per contrast.

    Raises:
        WorkbenchError: If rows do not match the plan's items, a metric is unknown, a score is not finite, or a contrast's tasks have no
            common ids.
    """
    tables = []
    for name, suite in suites.items():
        members = list({s.configuration.digest: s for s in scores if s.suite == name}.values())
        record, folder = store.record(members[0]), store.folder(name, members[0].plan)
        if lacking := [task for task in suite.tasks if task not in record.tasks]:
            raise WorkbenchError(
                f"{folder / 'plan.json'}: task '{lacking[0]}' of the suite is missing", rescore_hint(folder / "plan.json")
            )
        read = _Stored(
            suite,
            members[0].plan,
            record,
            store.items(members[0]),
            {s.configuration.digest: store.rows(s) for s in members},
            {s.configuration.digest: s.configuration.name for s in members},
            str(folder),
        )
        tables += [read.table(task, suite.primary.get(task, record.tasks[task].primary)) for task in suite.tasks]
        tables += [read.contrast(name, contrast) for name, contrast in suite.contrasts.items()]
    often = Counter(t.name for t in tables)
    return [replace(t, name=f"{t.name} ({t.suite.suite})") if often[t.name] > 1 else t for t in tables]


@dataclass(frozen=True)
class _Stored:
    """The store's content for one plan."""

    suite: Suite
    plan: str
    record: PlanRecord
    items: Mapping[str, Sequence[Row]]
    rows: Mapping[str, Mapping[str, Sequence[Row]]]  # by digest, task
    names: Mapping[str, str]  # by digest
    folder: str

    def table(self, task: str, metric: str) -> Table:
        """Return the table of a task under one metric."""
        about = self.record.tasks[task]
        known = [*about.metrics, *([MARGIN] if about.kind == "multiple_choice" else [])]
        if metric not in known:
            raise WorkbenchError(f"suite '{self.suite.suite}': task '{task}' has no metric '{metric}'", nearest(metric, known))
        items = self.items.get(task, ())
        if not items:
            raise WorkbenchError(f"{self.folder}: task '{task}' has no items", "Delete the folder and score again.")
        kind = about.ratios.get(metric)
        weighted = kind in RATIOS
        values: dict[str, Floats] = {}
        weights: Floats | None = None
        for digest, rows in self.rows.items():
            if [row["id"] for row in rows.get(task, ())] != [item["id"] for item in items]:
                raise WorkbenchError(
                    f"{self.folder}: items of {digest[:12]} on '{task}' differ from the plan's items",
                    "The stored rows are damaged: delete the folder and score again.",
                )
            numbers = self._numbers(task, metric, digest, 2 if weighted else 1)
            values[digest] = numbers[:, 0]
            if weights is not None and not np.array_equal(weights, numbers[:, 1]):
                raise WorkbenchError(
                    f"{self.folder}: items of {digest[:12]} on '{task}' have other weights than the same items of other configurations",
                    "The stored rows are damaged: delete the folder and score again.",
                )
            weights = numbers[:, 1] if weighted else None
        return Table(
            name=task,
            metric=metric,
            suite=self.suite,
            plan=self.plan,
            items=items,
            cluster=codes([item["cluster"] for item in items]),
            values=values,
            rows={digest: rows[task] for digest, rows in self.rows.items()},
            kind=about.kind,
            lower=metric in about.lower,
            ratio=kind,
            weights=weights,
            scorer=self.record.scorer,
        )

    def contrast(self, name: str, contrast: Contrast) -> Table:
        """Return the table of metric(of) - metric(minus) on the items that both tasks have, with the clusters of `of`."""
        where = f"suite '{self.suite.suite}', contrast '{name}'"
        metric = contrast.metric or self.suite.primary.get(contrast.of, self.record.tasks[contrast.of].primary)
        of, minus = (self.table(task, metric) for task in (contrast.of, contrast.minus))
        if of.ratio or minus.ratio:
            raise WorkbenchError(
                f"{where}: '{metric}' is computed from all items together, so that an item has no score",
                "Use a metric that is a mean over items: `metric: acc`.",
            )
        partner = {item["id"]: i for i, item in enumerate(minus.items)}
        pairs = [(i, partner[item["id"]]) for i, item in enumerate(of.items) if item["id"] in partner]
        if not pairs:
            raise WorkbenchError(
                f"{where}: '{contrast.of}' and '{contrast.minus}' have no item id in common; their first ids are "
                f"'{of.items[0]['id']}' and '{minus.items[0]['id']}'",
                "Items are paired by id: use the same ids in both data files, and the same limit for both tasks.",
            )
        of_rows, minus_rows = (np.array(side) for side in zip(*pairs, strict=True))
        items = [of.items[i] for i in of_rows]
        return Table(
            name=name,
            metric=metric,
            suite=self.suite,
            plan=self.plan,
            items=items,
            cluster=codes([item["cluster"] for item in items]),
            values={digest: of.values[digest][of_rows] - minus.values[digest][minus_rows] for digest in of.values},
            rows={},
            contrast=contrast,
            scorer=of.scorer,
        )

    def _numbers(self, task: str, metric: str, digest: str, width: int) -> Floats:
        """Return scores or contributions of items [items, width]: (score,), or (numerator, weight) for a ratio of sums."""
        scores = []
        for row, item in zip(self.rows[digest][task], self.items[task], strict=True):
            value = row["metrics"].get(metric)
            if value is None and metric == MARGIN:
                value = margin_of(row, item)
            if value is None:
                raise WorkbenchError(
                    f"{self.folder}: '{self.names[digest]}' has no '{metric}' for item '{row['id']}' of '{task}'",
                    "The scores were stored before the task had this metric, or lm-eval's aggregation gives no number on these answers. In the "
                    "first case, delete the folder and score again; else choose another `primary` metric.",
                )
            numbers = np.ravel(np.asarray(value, np.float64))
            if numbers.size != width or not np.isfinite(numbers).all() or (width == 2 and numbers[1] < 0):
                expected = "a finite number" if width == 1 else "a log-likelihood and a weight"
                raise WorkbenchError(
                    f"{self.folder}: '{self.names[digest]}', item '{row['id']}' of '{task}': {metric} is {value}, expected {expected}",
                    "The stored rows are damaged: delete the folder and score again.",
                )
            scores.append(numbers)
        numbers = np.stack(scores)
        if width == 2 and not numbers[:, 1].sum() > 0:
            raise WorkbenchError(
                f"{self.folder}: all weights of '{metric}' on '{task}' are 0", "Check the task's data: its texts are empty."
            )
        return numbers
