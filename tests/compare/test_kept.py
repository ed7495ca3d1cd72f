"""The share of its parents' skill that a configuration keeps: the choice of the best parent, and the interval, from their definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from workbench.compare.kept import kept_of
from workbench.compare.tables import Table
from workbench.scores.statistics import expanded_tail, resampled_clusters
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite

MERGE, *BRICKS = (
    Configuration(f"{i:032d}", name, parents=("one", "two", "three")) for i, name in enumerate(("mine", "one", "two", "three"))
)
PARENTS = {c.name: c.digest for c in BRICKS}
CHANCE = 0.25


def table(name: str, levels: tuple[float, ...], clusters: int, seed: int) -> Table:
    """Right and wrong answers of the merge and of its bricks, in clusters of three to six items that differ in difficulty."""
    rng = np.random.default_rng(seed)
    cluster = np.arange(clusters).repeat(rng.integers(3, 7, clusters))
    hard = 0.5 * rng.random(clusters)[cluster] + 0.5 * rng.random(cluster.size)
    values = {
        c.digest: (hard + 0.2 * rng.random(cluster.size) < level) * 1.0
        for c, level in zip((MERGE, *BRICKS), levels, strict=False)
    }
    suite = Suite(suite="s", tasks=("t", "u"), chance={"t": CHANCE, "u": CHANCE})
    return Table(name, "acc", suite, "p", [{}] * cluster.size, cluster, values, {})


def side(t: Table, c: Configuration) -> np.ndarray[Any, Any]:
    """A score and the ends of its interval, corrected for chance."""
    return (np.array([t.value(c.digest), *t.interval(c.digest)]) - CHANCE) / (1 - CHANCE)


@pytest.mark.parametrize("merge", [0.75, 0.5, 0.38])
def test_with_few_clusters_the_ends_solve_donner_and_zous_equation(merge: float) -> None:
    """(top - x bottom)^2 = a^2 - 2 x c + x^2 b^2, where a, b move the ratio to that end and c is their product times the correlation.

    The merge is near its parent, half as good, and at chance, so that a smaller parent moves the lower end further down.
    """
    tables = [table("t", (merge, 0.9), 12, 1), table("u", (merge, 0.8), 9, 2)]
    kept, whole = kept_of(tables, MERGE, {"one": PARENTS["one"]})
    assert whole is not None
    for chosen, found in (([tables[0]], kept["t"]), ([tables[1]], kept["u"]), (tables, whole)):
        (tops, bottoms), correlations = np.array([[side(t, c) for t in chosen] for c in (MERGE, BRICKS[0])]), []
        for t in chosen:
            off = [np.bincount(t.cluster, t.values[c.digest] - t.values[c.digest].mean()) for c in (MERGE, BRICKS[0])]
            correlations.append(np.corrcoef(off)[0, 1])
        top, bottom = tops[:, 0].sum(), bottoms[:, 0].sum()
        assert found.value == pytest.approx(top / bottom)
        assert found.low is not None
        assert found.high is not None
        assert found.low < top / bottom < found.high
        down, up, smaller, larger = (
            tops[:, 0] - tops[:, 1],
            tops[:, 2] - tops[:, 0],
            bottoms[:, 0] - bottoms[:, 1],
            bottoms[:, 2] - bottoms[:, 0],
        )
        below = bool(top <= 0 or top**2 <= (down**2).sum())
        assert (found.low < 0) == below
        for x, a, b in ((found.high, up, smaller), (found.low, down, smaller if below else larger)):
            right = (a**2).sum() - 2 * x * (a * b * correlations).sum() + x * x * (b**2).sum()
            assert (top - x * bottom) ** 2 == pytest.approx(right, rel=1e-6)


def test_the_best_parent_is_chosen_on_one_half_and_scored_on_the_other() -> None:
    """Both ways over five splits, equal ones share; every resample of the clusters chooses again. The ends keep the best one's distances."""
    t = table("t", (0.7, 0.8, 0.82, 0.6), 24, 3)
    sums = np.stack([np.bincount(t.cluster, t.values[c.digest]) for c in BRICKS], 1)
    rng, sizes = np.random.default_rng(24), np.bincount(t.cluster)
    halves = [rng.permutation(24) % 2 == 1 for _ in range(5)]

    def honest(counts: Any) -> float:
        taken = []
        for half in [*halves, *(~half for half in halves)]:
            seen, left = counts[half] @ sums[half], counts[~half] @ sums[~half]
            taken.append(left[seen == seen.max()].mean())
        return float((sum(taken) / 5 / (counts @ sizes) - CHANCE) / (1 - CHANCE))

    draws = resampled_clusters(24, t.seed)
    bottom, resampled = honest(np.ones(24)), np.array([honest(counts) for counts in draws])
    kept, _ = kept_of([t], MERGE, PARENTS)
    assert kept["t"].value == pytest.approx(side(t, MERGE)[0] / bottom)
    assert bottom < max(side(t, c)[0] for c in BRICKS)
    tail = expanded_tail(0.025, t.effective)
    ends = np.quantile(t.resampled[MERGE.digest] / resampled, (tail, 1 - tail))
    assert (kept["t"].low, kept["t"].high) == pytest.approx(tuple(ends), rel=1e-9)
    few = replace(t, cluster=t.cluster // 2)  # twelve clusters: the interval of the best one, moved to the honest score
    found = kept_of([few], MERGE, PARENTS)[0]["t"]
    best = max(BRICKS, key=lambda c: few.value(c.digest))
    top, own = side(few, MERGE), side(few, best)
    moved = top[0] / (found.value or 1.0)
    a, b = top[2] - top[0], own[0] - own[1]
    off = [np.bincount(few.cluster, few.values[c.digest] - few.values[c.digest].mean()) for c in (MERGE, best)]
    x = found.high or 0.0
    assert (top[0] - x * moved) ** 2 == pytest.approx(a * a - 2 * x * a * b * np.corrcoef(off)[0, 1] + x * x * b * b, rel=1e-6)
