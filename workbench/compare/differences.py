"""Differences from the baseline and their verdicts, one row per configuration and task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal, get_args

from workbench.compare.families import COMPARED, CONTROLS, GUARDED, Ruling, TestedCell, cells_of, excluded, rulings, skewed
from workbench.compare.tables import Table
from workbench.ground.results import JsonObject, Measured, Number
from workbench.scores.paired import Pair, paired
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS
from workbench.scores.store import Configuration
from workbench.scores.suite import MARGIN

Verdict = Literal["better", "worse", "equivalent", "cannot tell", "safe", "not shown safe", "no item changed"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


GUARD_VERDICTS = ("safe", "not shown safe")
"""Verdicts that only guarded tasks can have; "worse" and "no item changed" apply to all tasks."""
OPEN_VERDICTS = ("cannot tell", "not shown safe")
"""Verdicts that more items could decide."""
_IMPOSSIBLE = "no difference can be significant"


class Companion(JsonObject):
    """The difference of a second metric on the same items; it does not decide a verdict."""

    metric: str
    """Name of the metric."""
    unit: str
    """Unit of its values."""
    value: Measured
    """The configuration's score."""
    baseline_value: Measured
    """The baseline's score."""
    diff: Measured
    """Configuration minus baseline."""
    low: Measured
    """Lower end of the unadjusted 95 % interval of the difference."""
    high: Measured
    """Upper end of the interval."""
    p: Measured
    """Two-sided p value of "no difference", not adjusted."""


class Difference(JsonObject):
    """One configuration against the baseline on one task or contrast. An infinite or undefined number is null."""

    configuration: str
    """Name of the configuration."""
    role: str
    """"configuration" for a named one; "base", "brick", "average", "memory", "finetune" or "adapter" for a control."""
    task: str
    """Name of the task or contrast."""
    metric: str
    """Primary metric of the task."""
    value: Measured
    """The configuration's score in the metric's units."""
    baseline_value: Measured
    """The baseline's score."""
    diff: Measured
    """Configuration minus baseline."""
    low: Measured
    """Lower end of the unadjusted 95 % interval of the difference."""
    high: Measured
    """Upper end of this interval."""
    low_adj: Measured
    """Lower end of the interval adjusted for the family of comparisons."""
    high_adj: Measured
    """Upper end of this interval."""
    p: Measured
    """Two-sided p value of "no difference", not adjusted."""
    p_adj: Measured
    """p value adjusted for the family."""
    n: int
    """Number of items that both have."""
    clusters: int
    """Number of clusters of these items."""
    mde: Measured
    """Difference that would be detected with 80 % power at the adjusted level; null if the differences have no spread."""
    needs: int | None
    """Approximate number of items that would decide an undecided row; null for other rows."""
    stands_up_to: Measured = None
    """Change of an item that was not drawn, against the verdict, up to which "better" or "worse" holds. Null for other verdicts and for
    perplexities, if it is the metric's whole range or more, and for right/wrong items that are clusters of their own, where it does not
    matter."""
    verdict: Verdict
    """The verdict. "safe" and "not shown safe" are for guarded tasks."""
    reason: str | None
    """Reason of the verdicts "cannot tell" and "not shown safe"."""
    wins: int
    """Number of items that got better."""
    losses: int
    """Number of items that got worse."""
    lower: bool = False
    """Whether lower scores are better."""
    ratio: bool = False
    """Whether the metric is computed from all items together, not a mean of scores of items."""
    family: str = COMPARED
    """Family of comparisons that the row is tested in: "compared", "guarded" or "controls"."""
    tolerance: Number | None = None
    """Largest loss on a guarded task that counts as safe, in the metric's units; null for other tasks."""
    companion: Companion | None = None
    """Difference of the margin of the gold choice, for multiple-choice tasks."""

    @property
    def guarded(self) -> bool:
        """True if the verdict is about harm: safe, worse or not shown safe."""
        return self.family == GUARDED

    @property
    def apart(self) -> bool:
        """True if the comparison was tested among the controls, separately from the named configurations."""
        return self.family == CONTROLS or (self.guarded and self.role != "configuration")

    @property
    def condition(self) -> str:
        """The words before `stands_up_to` in "better, unless an unseen item falls by 62 points"; empty if that is null."""
        return "" if self.stands_up_to is None else f"unless an unseen item {'falls' if (self.diff or 0) > 0 else 'rises'} by"

    @property
    def impossible(self) -> bool:
        """True if the clusters are too few for any significant difference within the family."""
        return (self.reason or "").startswith(_IMPOSSIBLE)

    @property
    def needed(self) -> int | None:
        """Number of items that would decide the row, if it is larger than the number of those that there are."""
        return self.needs if self.needs and self.needs > self.n else None

    @property
    def worst(self) -> float | None:
        """The largest loss in the adjusted interval, as a positive number; negative if a gain is certain."""
        end = self.high_adj if self.lower else self.low_adj
        return None if end is None else end if self.lower else -end


class Effect(JsonObject):
    """A difference that is outside the families, with its interval and verdict."""

    diff: Measured
    """The difference."""
    low: Measured
    """Lower end of its interval."""
    high: Measured
    """Upper end of its interval."""
    verdict: Verdict | None
    """The verdict."""


class Interference(JsonObject):
    """Differences of each brick alone from the base; matrices by brick and task, null where it was not scored."""

    bricks: tuple[str, ...]
    """Bricks that were scored alone."""
    tasks: tuple[str, ...]
    """Names of the tasks."""
    diff: list[list[Measured]]
    """The differences."""
    low: list[list[Measured]]
    """Lower ends of the adjusted intervals."""
    high: list[list[Measured]]
    """Upper ends of these intervals."""
    verdict: list[list[Verdict | None]]
    """The verdicts."""

    @cached_property
    def effects(self) -> dict[tuple[str, str], Effect]:
        """Brick and task -> the difference, for those that were scored."""
        numbers = zip(self.diff, self.low, self.high, self.verdict, strict=True)
        return {
            (brick, task): Effect(diff=diff, low=low, high=high, verdict=verdict)
            for brick, lines in zip(self.bricks, numbers, strict=True)
            for task, diff, low, high, verdict in zip(self.tasks, *lines, strict=True)
            if diff is not None
        }


def differences(
    tasks: Sequence[Table],
    base: Configuration,
    others: Iterable[Configuration],
    alpha: float,
    correction: str = "max-t",
    looked: Sequence[Configuration] = (),
) -> list[Difference]:
    """Return one row per configuration and task; each family is corrected separately.

    Args:
        tasks: Tables of the tasks.
        base: The baseline.
        others: The configurations that get rows.
        alpha: Error rate of a family.
        correction: "max-t" or "none".
        looked: Configurations that are tested in the same families and get no rows. They do not count for the verdict "worse".
    """
    cells, hidden = cells_of(tasks, base, [*others, *looked]), {c.digest for c in looked}
    found = rulings(cells, alpha, correction)
    if hidden:  # nobody names the worst of twenty to make it look worse: what was looked at must not weaken an alarm
        named = [i for i, cell in enumerate(cells) if cell.configuration.digest not in hidden]
        for i, alone in zip(named, rulings([cells[i] for i in named], alpha, correction), strict=True):
            if cells[i].loses:
                whole = found[i]
                found[i] = replace(
                    whole,
                    p=alone.p,
                    least=alone.least,
                    standing=alone.standing,
                    interval_p=whole.p if whole.interval_p is None else whole.interval_p,
                )
    return [
        _difference(cell, ruling, base, alpha)
        for cell, ruling in zip(cells, found, strict=True)
        if cell.configuration.digest not in hidden
    ]


def unchanged(tasks: Sequence[Table], base: Configuration, name: str) -> Iterator[Difference]:
    """Yield the rows of a configuration with the baseline's weights, which needs no test."""
    again = replace(base, name=name, role="configuration")
    for t in tasks:
        cell = TestedCell(again, t, t.paired(base.digest, base.digest), base.digest)
        row = _difference(cell, Ruling(1.0, 0.0, 0.0, 1.0), base, 0.05)
        yield row.model_copy(update={"verdict": "no item changed", "reason": None, "needs": None, "companion": None})


def _difference(cell: TestedCell, ruling: Ruling, base: Configuration, alpha: float) -> Difference:
    """Return the row of a configuration and a task with its verdict."""
    task, pair, start = cell.table, cell.pair, cell.table.value(base.digest)
    low, high = pair.interval(0.05)
    alarm = task.guarded and cell.loses and ruling.p <= alpha
    ends = pair.within(ruling.critical, alarm or ruling.excludes_zero(alpha))
    gained, lost = (pair.losses, pair.wins) if task.lower else (pair.wins, pair.losses)
    verdict, reason, needs = (_guarded if task.guarded else _compared)(cell, ruling, ends, alpha)
    return Difference(
        configuration=cell.configuration.name,
        role=cell.configuration.role,
        task=task.name,
        metric=task.metric,
        value=start + pair.diff,
        baseline_value=start,
        diff=pair.diff,
        low=low,
        high=high,
        low_adj=ends[0],
        high_adj=ends[1],
        p=pair.p,
        p_adj=ruling.p,
        n=pair.n,
        clusters=pair.clusters,
        mde=pair.mde(ruling.critical, ruling.standing, alpha),
        needs=needs,
        stands_up_to=_stands_up_to(cell, ruling, alpha) if verdict in ("better", "worse") else None,
        verdict=verdict,
        reason=reason,
        wins=gained,
        losses=lost,
        lower=task.lower,
        ratio=task.ratio is not None,
        family=cell.family,
        tolerance=task.tolerance if task.guarded else None,
        companion=_companion(task, base.digest, cell.configuration.digest),
    )


def _stands_up_to(cell: TestedCell, ruling: Ruling, alpha: float) -> float | None:
    """Return up to which change of an unseen item a verdict holds; None if any that the metric declares possible."""
    most = cell.pair.withstands(ruling.standing, alpha) if ruling.standing else None
    return None if most is None or 0 < cell.table.reach <= most else most


_Judgement = tuple[Verdict, str | None, int | None]
"""Verdict, its reason, and the number of items that would decide it."""


def _compared(cell: TestedCell, ruling: Ruling, ends: tuple[float, float], alpha: float) -> _Judgement:
    """Judge a row: better and worse by the family's test, equivalent if a difference as large as min_effect is excluded."""
    task, pair, margin = cell.table, cell.pair, cell.table.min_effect
    if pair.unchanged:
        return "no item changed", None, None
    if pair.clusters < FEW_CLUSTERS:
        return "cannot tell", *_too_few(pair)
    if ruling.p <= alpha:
        return "better" if (pair.diff > 0) != task.lower else "worse", None, None
    if margin is not None and excluded(cell.drawn, ends, margin, ruling.level(pair)):
        return "equivalent", None, None
    if standing := ruling.withheld(alpha):
        return "cannot tell", skewed(pair.clusters), pair.needs_to_stand(standing, alpha)
    if ruling.least > alpha and 2 * pair.changes.moved >= pair.clusters:  # else more items help as well as more clusters
        return "cannot tell", _never_significant(pair, ruling), None
    if margin is not None and -margin < ends[0] and ends[1] < margin:
        both = [cell.drawn.needs_to_exclude(margin, side, ruling.level(pair)) for side in (-1, 1)]
        return "cannot tell", _rare("difference", cell), None if None in both else max(n or 0 for n in both)
    needs = pair.needs(max(abs(pair.diff), margin or 0.0), ruling.critical, ruling.standing, alpha)
    if margin is None:
        return "cannot tell", "the adjusted interval includes 0, and the suite gives no min_effect for this metric", needs
    return "cannot tell", "the adjusted interval includes 0 and a difference as large as the smallest effect of interest", needs


def _guarded(cell: TestedCell, ruling: Ruling, ends: tuple[float, float], alpha: float) -> _Judgement:
    """Judge a guarded row: safe if a loss as large as the tolerance is excluded, worse by the test of its guarded tasks."""
    task, pair, tolerance = cell.table, cell.pair, cell.table.tolerance
    if pair.clusters < FEW_CLUSTERS:
        return "not shown safe", *_too_few(pair)
    losing = 1 if task.lower else -1
    worst = ends[1] if task.lower else -ends[0]  # the largest loss in the adjusted interval
    if tolerance is not None and worst < tolerance and cell.drawn.excludes(tolerance, losing, ruling.level(pair)):
        return "safe", None, None
    if cell.loses and ruling.p <= alpha:
        return "worse", None, None
    if tolerance is None:
        return "not shown safe", "the suite gives no tolerance for this metric", None
    if worst < tolerance:
        needs = cell.drawn.needs_to_exclude(tolerance, losing, ruling.level(pair))
        return "not shown safe", _rare("loss", cell), needs
    room = tolerance - max(losing * pair.diff, 0.0)  # from the observed loss to the tolerance
    needs = pair.needs(room, ruling.critical)
    return "not shown safe", "the adjusted interval includes a loss as large as the tolerance", needs


def _rare(what: str, cell: TestedCell) -> str:
    """Return the reason why an interval within its bound does not exclude a change that few clusters have."""
    drawn, seen = cell.drawn, "no item changed, but " if cell.pair.unchanged else ""
    if drawn.changes.worst is None:
        return f"{seen}the metric has no range: the suite's `worst` must give the largest {what} of a cluster"
    units = "items" if drawn.clusters > cell.pair.clusters else "clusters"
    return f"{seen}{drawn.clusters} {units} do not exclude a large {what} on a few {units} that were not drawn"


def _too_few(pair: Pair) -> tuple[str, int | None]:
    """Return the reason of a verdict on too few clusters, and the number of items that would help."""
    reason = f"too few clusters: {pair.clusters}, at least {FEW_CLUSTERS} needed"
    return reason, pair.needs(abs(pair.diff)) or math.ceil(pair.n * MANY_CLUSTERS / pair.clusters)


def _never_significant(pair: Pair, ruling: Ruling) -> str:
    return (
        f"{_IMPOSSIBLE}: even if all {pair.changes.moved} changed clusters had changed in the same direction, the "
        f"adjusted p would be {ruling.least:.2g}; more clusters or fewer comparisons are needed"
    )


def _companion(task: Table, base: str, digest: str) -> Companion | None:
    if task.metric == MARGIN or not task.margins:
        return None
    pair, start = paired(task.margins[base], task.margins[digest], task.cluster.tolist()), float(task.margins[base].mean())
    low, high = pair.interval(0.05)
    return Companion(
        metric=MARGIN,
        unit="nats",
        value=start + pair.diff,
        baseline_value=start,
        diff=pair.diff,
        low=low,
        high=high,
        p=pair.p,
    )


def interference(tasks: Sequence[Table], bricks: Sequence[Configuration], rows: Sequence[Difference]) -> Interference:
    """Return the matrix of differences of each brick alone from the base, by brick and task."""
    cells = {(row.configuration, row.task): row for row in rows}
    table = [[cells.get((brick.name, task.name)) for task in tasks] for brick in bricks]
    return Interference(
        bricks=tuple(b.name for b in bricks),
        tasks=tuple(t.name for t in tasks),
        diff=[[cell and cell.diff for cell in line] for line in table],
        low=[[cell and cell.low_adj for cell in line] for line in table],
        high=[[cell and cell.high_adj for cell in line] for line in table],
        verdict=[[cell and cell.verdict for cell in line] for line in table],
    )
