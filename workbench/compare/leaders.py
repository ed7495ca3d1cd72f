"""Leaders: the configurations with the best means over skills, tested against the baseline and against each other.

Two families are declared before any score is looked at, on the mean over skills. One has every member against the baseline; the other has
every two members other than the baseline. A question that is not asked costs no power: with a baseline, four members and their pairs in one
family, a true gain was found half as often as by each family alone. The members are the candidates of the comparison and the
configurations that were looked at before on the same items. Which of them lead is decided by the same scores that the tests use. A test of
the best two alone would therefore reject too often: the best of twenty equal configurations looks better than most others. Here every
difference is held against the largest difference of its family under the same sign flips (max-T), so that a verdict keeps its level
whichever pairs are looked at afterwards.

A leader is the candidate with the highest mean, and every other one that the family's test does not show to be worse than it. So the truly
best configuration is among the leaders with probability 1 - alpha or more (Hsu 1996, Multiple Comparisons, on comparisons with the best).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import numpy as np

from workbench.compare.families import Ruling, excluded, ruled, skewed
from workbench.compare.tables import Table
from workbench.ground.results import JsonObject, Measured, Number
from workbench.scores.changes import pooled
from workbench.scores.paired import Paired, tested_together
from workbench.scores.statistics import FEW_CLUSTERS
from workbench.scores.store import Configuration

MOST_MEMBERS = 80
"""Members whose pairs are tested: the points of the largest sweep that needs no `--max-points`, and their controls. The pairs grow with the
square of this number; among more members each is tested against the baseline alone."""
MeanVerdict = Literal["better", "worse", "equivalent", "cannot tell", "no item changed"]
_MIRRORED: Mapping[MeanVerdict, MeanVerdict] = {"better": "worse", "worse": "better"}


class MeanDifference(JsonObject):
    """The difference of two configurations' means over skills, tested in the family of pairs."""

    configuration: str
    """Name of the configuration."""
    against: str
    """Name of the configuration that it is compared with."""
    diff: Number
    """Mean of the first minus mean of the second, corrected for chance."""
    low: Measured
    """Lower end of the interval at the family's critical value; null if it is infinite."""
    high: Measured
    """Upper end of this interval."""
    p: Number
    """p value adjusted for the family."""
    stands_up_to: Measured = None
    """Change of an item that was not drawn, against the verdict, up to which "better" or "worse" holds; null if that does not matter."""
    verdict: MeanVerdict
    """The verdict on the first configuration."""
    needs: int | None = None
    """Approximate number of items over the skill tasks that would decide "cannot tell"; null for other verdicts."""
    reason: str | None = None
    """Reason of "cannot tell" if more items of the same clusters would not help; null otherwise."""

    def mirrored(self) -> MeanDifference:
        """Return the same difference from the other side."""
        return MeanDifference(
            configuration=self.against,
            against=self.configuration,
            diff=0.0 - self.diff,  # a difference of 0 has no sign
            low=None if self.high is None else 0.0 - self.high,
            high=None if self.low is None else 0.0 - self.low,
            p=self.p,
            stands_up_to=self.stands_up_to,
            verdict=_MIRRORED.get(self.verdict, self.verdict),
            needs=self.needs,
            reason=self.reason,
        )


class MeanPairs:
    """Pairs of some configurations on the mean over skills: each against the baseline, and the others against each other."""

    def __init__(
        self,
        skills: Sequence[Table],
        members: Sequence[Configuration],
        alpha: float,
        baseline: Configuration | None = None,
    ) -> None:
        """Test the pairs.

        Args:
            skills: Tables of the skill tasks; each has scores of all members and the baseline.
            members: The configurations, all with different digests and names; the baseline may be among them.
            alpha: Error rate of a family.
            baseline: Configuration whose pairs are a family of their own; None: all pairs are one family.
        """
        self.alpha = alpha
        self._skills = skills
        self._baseline = baseline.name if baseline else None
        rest = [c for c in members if c.name != self._baseline]
        everyone = [*rest, baseline] if baseline else rest
        self.members = len(everyone)
        self._digests = {c.name: c.digest for c in everyone}
        self.means = {c.name: mean_over(skills, c) for c in everyone}
        self.margin = float(np.mean([(t.min_effect or 0.0) / t.span for t in skills]))
        smallest = min(skills, key=lambda t: t.clusters)
        self._few = (
            f"too few clusters: {smallest.name} has {smallest.clusters}, at least {FEW_CLUSTERS} needed"
            if smallest.clusters < FEW_CLUSTERS
            else None
        )
        self._pairs = _tested(skills, [(c, baseline) for c in rest] if baseline else [], alpha)
        if self.members <= MOST_MEMBERS:
            self._pairs |= _tested(skills, list(combinations(rest, 2)), alpha)

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def between(self, a: str, b: str) -> MeanDifference:
        """Return the difference of the means of `a` and `b`, two different members."""
        if (b, a) in self._pairs:
            return self.between(b, a).mirrored()
        if (a, b) not in self._pairs:
            reason = f"pairs are tested among {MOST_MEMBERS} configurations at most, and these are {self.members}"
            diff = self.means[a] - self.means[b]
            return MeanDifference(
                configuration=a, against=b, diff=diff, low=None, high=None, p=1.0, verdict="cannot tell", reason=reason
            )
        pair, ruling = self._pairs[a, b]
        ends = pair.within(ruling.critical, ruling.excludes_zero(self.alpha))
        verdict, why, needs = self._judged((a, b), ends, pair, ruling)
        return MeanDifference(
            configuration=a,
            against=b,
            diff=pair.diff,
            low=ends[0],
            high=ends[1],
            p=ruling.p,
            stands_up_to=self._stands_up_to(pair, ruling) if verdict in ("better", "worse") else None,
            verdict=verdict,
            needs=needs,
            reason=why,
        )

    def _stands_up_to(self, pair: Paired, ruling: Ruling) -> float | None:
        """Return up to which change of an unseen item a verdict holds; None if it is more than a task's whole range."""
        most = pair.withstands(ruling.standing, self.alpha) if ruling.standing else None
        return None if most is None or most >= max(1 / t.span for t in self._skills) else most

    def _judged(
        self, names: tuple[str, str], ends: tuple[float, float], pair: Paired, ruling: Ruling
    ) -> tuple[MeanVerdict, str | None, int | None]:
        """Return the verdict on a pair, its reason, and the number of items that would decide it."""
        if pair.unchanged:
            return "equivalent" if self._excluded(names, ends, ruling.level(pair)) else "no item changed", None, None
        if self._few:
            return "cannot tell", self._few, None
        if ruling.p <= self.alpha:
            return "better" if pair.diff > 0 else "worse", None, None
        if self._excluded(names, ends, ruling.level(pair)):
            return "equivalent", None, None
        if standing := ruling.withheld(self.alpha):
            return "cannot tell", skewed(pair.clusters), pair.needs_to_stand(standing, self.alpha)
        if ruling.least > self.alpha:
            return "cannot tell", "no difference can be significant: more clusters or fewer configurations are needed", None
        needs = pair.needs(max(abs(pair.diff), self.margin), ruling.critical, ruling.standing, self.alpha)
        return "cannot tell", None, needs if needs is not None and needs > pair.n else None

    def _excluded(self, names: tuple[str, str], ends: tuple[float, float], level: float) -> bool:
        if not (-self.margin < ends[0] and ends[1] < self.margin):
            return False  # most pairs; what follows reads all items again
        first, second = (self._digests[name] for name in names)
        drawn = pair_of(self._skills, first, second, drawn=True)
        return not self._few and excluded(drawn, ends, self.margin, level)

    def leaders(self, names: Sequence[str]) -> list[str]:
        """Return those of some members that are not shown to be worse than the one with the highest mean, the highest mean first."""
        ranked = sorted(names, key=lambda name: -self.means[name])
        return [name for name in ranked if name == ranked[0] or self.between(name, ranked[0]).verdict != "worse"]


def _tested(
    skills: Sequence[Table], pairs: Sequence[tuple[Configuration, Configuration]], alpha: float
) -> dict[tuple[str, str], tuple[Paired, Ruling]]:
    """Test some pairs as one family; return by their names the differences with the rulings."""
    tested = tested_together([pair_of(skills, a.digest, b.digest) for a, b in pairs])
    moved = [i for i, pair in enumerate(tested) if pair.changes.moved]
    alone = [pair.changes.critical(alpha / len(tested)) for pair in tested]
    rulings = [Ruling(1.0, critical, critical, 1.0) for critical in alone]
    mean = ["mean"] * len(moved)
    for i, ruling in zip(moved, ruled([tested[i].changes for i in moved], mean, mean, alpha), strict=True):
        rulings[i] = ruling
    return {(a.name, b.name): found for (a, b), found in zip(pairs, zip(tested, rulings, strict=True), strict=True)}


def mean_over(skills: Sequence[Table], c: Configuration) -> float:
    """Return the mean of a configuration's scores over skill tasks, corrected for chance."""
    return float(np.mean([t.corrected(t.value(c.digest)) for t in skills]))


def pair_of(skills: Sequence[Table], a: str, b: str, *, drawn: bool = False) -> Paired:
    """Return mean of `a` minus mean of `b`, two digests, corrected for chance over the clusters of all tasks (see `Table.paired`)."""
    pairs = [t.paired(b, a, drawn=drawn) for t in skills]
    changes = pooled([pair.changes for pair in pairs], [1 / t.span for t in skills])
    se = math.sqrt(sum((pair.se / t.span) ** 2 for pair, t in zip(pairs, skills, strict=True))) / len(skills)
    return Paired(
        n=sum(pair.n for pair in pairs),
        clusters=sum(pair.clusters for pair in pairs),
        diff=changes.mean,
        se=se,
        wins=sum(pair.wins for pair in pairs),
        losses=sum(pair.losses for pair in pairs),
        changes=changes,
    )
