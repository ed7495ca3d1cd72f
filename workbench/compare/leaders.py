"""Leaders: the named configurations with the best means over skills, tested against each other in pairs.

The family is declared before any score is looked at: every two of the members, on the mean over skills. The members are the named
configurations that were scored on all skill tasks, and the baseline. Which of them lead is decided by the same scores that the tests use. A
test of the best two alone would therefore reject too often: the best of twenty equal configurations looks better than most others. Here
every difference is held against the largest difference between any two members under the same sign flips (max-T), so that a verdict keeps
its level whichever pairs are looked at afterwards.

A leader is the configuration with the highest mean, and every other one that the family's test does not show to be worse than it. So the
truly best configuration is among the leaders with probability 1 - alpha or more (Hsu 1996, Multiple Comparisons, on comparisons with the
best).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from workbench.compare.families import Ruling, excluded, ruled, skewed
from workbench.compare.tables import Table
from workbench.scores.changes import pooled
from workbench.scores.paired import Paired, tested_together
from workbench.scores.statistics import FEW_CLUSTERS
from workbench.scores.store import Configuration

MOST_MEMBERS = 65
"""Members of the family: the baseline, and the points of the largest sweep that needs no `--max-points`. The pairs grow with the square of
this number; with more members there is no recommendation."""
_MIRRORED = {"better": "worse", "worse": "better"}


@dataclass(frozen=True)
class MeanDifference:
    """The difference of two configurations' means over skills.

    Attributes:
        configuration, against: Names of the two.
        diff: Mean of `configuration` minus mean of `against`, corrected for chance.
        low, high: Interval at the critical value of the family.
        p: p value adjusted for the family.
        verdict: better | worse | equivalent | cannot tell | no item changed, of `configuration`.
        needs: Approximate number of items, over all skill tasks, that would detect a difference as large as `diff`, or as the smallest
            effect of interest if that is larger. Only with "cannot tell", and only if there are fewer items.
        reason: Reason of "cannot tell" if more items of the same clusters would not help.
    """

    configuration: str
    against: str
    diff: float
    low: float
    high: float
    p: float
    verdict: str
    needs: int | None = None
    reason: str | None = None

    def mirrored(self) -> MeanDifference:
        """Return the same difference from the other side."""
        return replace(
            self,
            configuration=self.against,
            against=self.configuration,
            diff=0.0 - self.diff,  # a difference of 0 has no sign
            low=0.0 - self.high,
            high=0.0 - self.low,
            verdict=_MIRRORED.get(self.verdict, self.verdict),
        )

    def document(self) -> dict[str, Any]:
        """Return the entry of the comparison's document."""
        return asdict(self)


class MeanPairs:
    """All pairs of some configurations on the mean over skills, tested as one family."""

    def __init__(self, skills: Sequence[Table], members: Sequence[Configuration], alpha: float) -> None:
        """Test all pairs.

        Args:
            skills: Tables of the skill tasks; each has scores of all members.
            members: The configurations, all with different digests.
            alpha: Error rate of the family.
        """
        self.alpha = alpha
        self._skills, self._digests = skills, {c.name: c.digest for c in members}
        self.means = {c.name: mean_over(skills, c) for c in members}
        self.margin = float(np.mean([(t.min_effect or 0.0) / t.span for t in skills]))
        self._few = min(t.clusters for t in skills)
        names = list(combinations([c.name for c in members], 2))
        tested = tested_together([pair_of(skills, a.digest, b.digest) for a, b in combinations(members, 2)])
        moved = [i for i, pair in enumerate(tested) if pair.changes.moved]
        alone = [pair.changes.critical(alpha / len(tested)) for pair in tested]
        rulings = [Ruling(1.0, critical, critical, 1.0) for critical in alone]
        for i, ruling in zip(moved, ruled([tested[i].changes for i in moved], ["mean"] * len(moved), alpha), strict=True):
            rulings[i] = ruling
        self._pairs = dict(zip(names, zip(tested, rulings, strict=True), strict=True))

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def between(self, a: str, b: str) -> MeanDifference:
        """Return the difference of the means of `a` and `b`, two different members."""
        if (b, a) in self._pairs:
            return self.between(b, a).mirrored()
        pair, ruling = self._pairs[a, b]
        low, high = pair.within(ruling.critical, ruling.excludes_zero(self.alpha))
        found = MeanDifference(a, b, pair.diff, low, high, ruling.p, "cannot tell")
        if pair.unchanged:
            return replace(found, verdict="equivalent" if self._excluded(found, ruling.level(pair)) else "no item changed")
        if self._few < FEW_CLUSTERS:
            return replace(found, reason=f"too few clusters: {self._few}, at least {FEW_CLUSTERS} needed")
        if ruling.p <= self.alpha:
            return replace(found, verdict="better" if pair.diff > 0 else "worse")
        if self._excluded(found, ruling.level(pair)):
            return replace(found, verdict="equivalent")
        if ruling.flipped <= self.alpha:
            return replace(found, reason=skewed(pair.clusters), needs=pair.needs_symmetry(self.alpha))
        if ruling.least > self.alpha:
            return replace(found, reason="no difference can be significant: more clusters or fewer configurations are needed")
        needs = pair.needs(max(abs(pair.diff), self.margin), ruling.critical)
        return replace(found, needs=needs if needs is not None and needs > pair.n else None)

    def _excluded(self, found: MeanDifference, level: float) -> bool:
        drawn = pair_of(self._skills, self._digests[found.configuration], self._digests[found.against], drawn=True)
        return self._few >= FEW_CLUSTERS and excluded(drawn, (found.low, found.high), self.margin, level)

    def leaders(self, names: Sequence[str]) -> list[str]:
        """Return those of some members that are not shown to be worse than the one with the highest mean, the highest mean first."""
        ranked = sorted(names, key=lambda name: -self.means[name])
        return [name for name in ranked if name == ranked[0] or self.between(name, ranked[0]).verdict != "worse"]


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
