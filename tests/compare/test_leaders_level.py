"""How often the verdicts among the leaders err, although the leaders are chosen by the same scores: seeded simulations. With them what a
recommendation rests on besides: what was looked at before, bricks and averages as candidates, and kept skill.

The functions that the comparison uses are run. At a rate of 5 % the standard error of 200 trials is 1.5 points; `benchmarks/error_rates.py --of
leaders` runs more.
"""

from __future__ import annotations

import os
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from worlds.measured import measured

from workbench.compare.differences import differences
from workbench.compare.kept import kept_of
from workbench.compare.leaders import MeanPairs
from workbench.compare.recommend import recommendation_of
from workbench.compare.tables import Table
from workbench.scores.store import Configuration, Scores
from workbench.scores.suite import Suite

pytestmark = pytest.mark.nightly
TRIALS = int(os.environ.get("WORKBENCH_TRIALS", "200"))
MOST = 0.05 + 2.5 * (0.05 * 0.95 / TRIALS) ** 0.5  # 2.5 standard errors of the simulation above the level
MOST_ONE_SIDED = 0.025 + 2.5 * (0.025 * 0.975 / TRIALS) ** 0.5
MARGIN = 0.05


def members(number: int) -> list[Configuration]:
    return [Configuration(f"{i:012d}{0:020d}", f"c{i}") for i in range(number)]


def answers(rng: np.random.Generator, cluster: Any, gains: Any) -> Any:
    """Right (1) or wrong (0) answers [configurations, items]: items and clusters differ in difficulty, and what a configuration gains
    varies by cluster; `gains` [configurations] is added on average."""
    k, n, number = int(cluster.max()) + 1, cluster.size, len(gains)
    hard = rng.normal(size=n) + 0.7 * rng.normal(size=k)[cluster]
    by_cluster = 0.3 * rng.normal(size=(number, k))[:, cluster]
    return (hard + 0.6 * rng.normal(size=(number, n)) + by_cluster + np.asarray(gains)[:, None] > 0).astype(float)


def tables(rng: np.random.Generator, gains: Any, tasks: int, skewed: bool, n: int = 240, k: int = 24) -> list[Table]:
    """Tables of configurations with these gains on some tasks."""
    names = tuple(f"t{i}" for i in range(tasks))
    suite, found = Suite(suite="s", tasks=names, min_effect=MARGIN), []
    for name in names:
        sizes = np.exp(rng.normal(size=k)) if skewed else np.ones(k)
        cluster = np.repeat(np.arange(k), np.maximum(1, np.round(sizes / sizes.sum() * n)).astype(int))
        values = dict(zip((c.digest for c in members(len(gains))), answers(rng, cluster, gains), strict=True))
        found.append(Table(name, "acc", suite, "p", [{}] * cluster.size, cluster, values, {}))
    return found


def pairs(rng: np.random.Generator, gains: Any, tasks: int, skewed: bool, n: int = 240, k: int = 24) -> MeanPairs:
    """All pairs of configurations with these gains on some tasks."""
    return MeanPairs(tables(rng, gains, tasks, skewed, n, k), members(len(gains)), 0.05)


@pytest.mark.parametrize(("number", "tasks", "skewed"), [(10, 1, False), (10, 3, True), (16, 1, False)])
def test_equal_configurations_are_rarely_told_apart(number: int, tasks: int, skewed: bool) -> None:
    """No configuration is better: any verdict between any two, and so between those that are chosen by the same scores. Beside it the
    test of the two that differ most, without a correction."""
    rng, wrong, left_out, naive = np.random.default_rng(number + tasks), 0, 0, 0
    for _ in range(TRIALS):
        tested = pairs(rng, np.zeros(number), tasks, skewed)
        names = list(tested.means)
        ranked = sorted(names, key=lambda name: -tested.means[name])
        wrong += any(ruling.p <= tested.alpha for _, ruling in tested._pairs.values())
        left_out += len(tested.leaders(names)) < number
        # The best against the last, tested as if these two had been named before the scores were seen.
        chosen = sorted((ranked[0], ranked[-1]), key=names.index)
        naive += tested._pairs[chosen[0], chosen[1]][0].p <= 0.05
    case = {"kind": "two-way", "shape": "lognormal" if skewed else "equal", "clusters": 24, "items": 240, "level": 0.05}
    case |= {"configurations": number, "tasks": tasks}
    assert measured("any better or worse between two configurations", wrong / TRIALS, **case) <= MOST
    assert left_out <= wrong
    assert measured("the two that differ most, uncorrected", naive / TRIALS, **case) > 0.3, (
        "without a correction, choosing by the same scores would show"
    )


def test_the_best_configuration_is_among_the_leaders() -> None:
    """One is better than the rest by a little and two are nearly as good: it is left out, or anything is called better than it, rarely."""
    rng, gains, missed, covered = np.random.default_rng(7), [0.25, 0.2, 0.2, 0, 0, 0, 0, -0.2], 0, 0
    truth = answers(np.random.default_rng(0), np.arange(200_000) // 2, gains).mean(1)
    for _ in range(TRIALS):
        tested = pairs(rng, gains, 2, False)
        names = list(tested.means)
        missed += "c0" not in tested.leaders(names)
        ends = {(i, j): tested.between(f"c{i}", f"c{j}") for i, j in combinations(range(len(gains)), 2)}
        # A rejected pair's interval has its own step's critical value: those of the others hold for all pairs at once.
        covered += all(
            d.low <= truth[i] - truth[j] <= d.high for (i, j), d in ends.items() if d.verdict not in ("better", "worse")
        )
    case = {"kind": "two-way", "shape": "equal", "clusters": 24, "items": 240, "level": 0.05, "configurations": 8, "tasks": 2}
    assert measured("the best left out of the leaders", missed / TRIALS, **case) <= MOST_ONE_SIDED
    assert measured("all pairs covered at once", covered / TRIALS, **case) >= 1 - MOST


def test_equivalence_to_the_best_is_rarely_false() -> None:
    """All others truly lose as much as the margin to the first one, so that "equivalent" to it is false; two of the others are equal."""
    rng, number, wrong, found = np.random.default_rng(11), 8, 0, 0
    loss = float(stats.norm.ppf(0.5 - MARGIN) * (1 + 0.7**2 + 0.6**2 + 0.3**2) ** 0.5)
    truth = answers(np.random.default_rng(0), np.arange(400_000) // 2, [0.0, loss]).mean(1)
    assert truth[0] - truth[1] == pytest.approx(MARGIN, abs=0.004)
    for _ in range(TRIALS):
        tested = pairs(rng, [0.0, *[loss] * (number - 1)], 2, False, n=1920, k=192)
        wrong += any(tested.between("c0", f"c{i}").verdict == "equivalent" for i in range(1, number))
        found += tested.between("c1", "c2").verdict == "equivalent"
    case = {"kind": "two-way", "shape": "equal", "clusters": 192, "items": 1920, "level": 0.025, "configurations": 8, "tasks": 2}
    assert measured("any false equivalent to the best", wrong / TRIALS, **case) <= MOST_ONE_SIDED
    assert found / TRIALS > 0.8, "with so many items, equal configurations are found to be equivalent"


@pytest.mark.parametrize(("number", "tasks"), [(20, 1), (20, 2)])
def test_the_best_of_those_looked_at_is_rarely_better(number: int, tasks: int) -> None:
    """Equal configurations are scored, and the best one is named alone: its rows and its mean, with the others counted and without."""
    rng, found = np.random.default_rng(number), np.zeros(4)
    base, *others = members(number + 1)
    for _ in range(TRIALS):
        made = tables(rng, np.zeros(number + 1), tasks, False)
        best = max(others, key=lambda c: sum(t.value(c.digest) for t in made))
        rest = [c for c in others if c != best]
        alone, counted = differences(made, base, [best], 0.05), differences(made, base, [best], 0.05, looked=rest)
        assert len(counted) == len(alone) == tasks
        means = (MeanPairs(made, [best, *looked], 0.05, base).between(best.name, base.name) for looked in ((), rest))
        found += (
            *(any(row.verdict == "better" for row in rows) for rows in (alone, counted)),
            *(mean.verdict == "better" for mean in means),
        )
    row_alone, row, mean_alone, mean = found / TRIALS
    case = {
        "kind": "two-way",
        "shape": "equal",
        "clusters": 24,
        "items": 240,
        "level": 0.05,
        "configurations": number,
        "tasks": tasks,
    }
    assert measured("the best named alone is better on a task", row, **case) <= MOST
    assert measured("the best named alone is better on the mean", mean, **case) <= MOST
    assert measured("the same on a task, the others uncorrected", row_alone, **case) > MOST
    assert measured("the same on the mean, the others uncorrected", mean_alone, **case) > MOST


def test_controls_that_harm_are_rarely_shipped() -> None:
    """The base, two bricks, an average and a merge, all clearly better; on the guarded task each truly loses as much as the tolerance."""
    rng, shipped, gains = np.random.default_rng(23), 0, [0.0, 0.8, 0.8, 0.8, 0.8]
    roles = ("base", "brick", "brick", "average", "configuration")
    base, *others = (Configuration(c.digest, c.name, role) for c, role in zip(members(5), roles, strict=True))
    entries = [
        [Scores(suite="s", plan="p", configuration=c, seconds=0, device="", created="", versions={}, tasks={})]
        for c in (base, *others)
    ]
    loss = float(stats.norm.ppf(0.5 - MARGIN) * (1 + 0.7**2 + 0.6**2 + 0.3**2) ** 0.5)
    suite = Suite(suite="s", tasks=("t", "u"), roles={"u": "guarded"}, tolerance=MARGIN)
    cluster = np.arange(960) // 10
    for _ in range(TRIALS):
        made = [
            Table(
                name,
                "acc",
                suite,
                "p",
                [{}] * 960,
                cluster,
                dict(zip((c.digest for c in members(5)), answers(rng, cluster, g), strict=True)),
                {},
            )
            for name, g in (("t", gains), ("u", [0.0, *[loss] * 4]))
        ]
        rows = differences(made, base, others, 0.05)
        found = recommendation_of(made, base, entries, rows, 0.05, {})
        assert found is not None
        shipped += found.configuration is not None
    case = {"kind": "two-way", "shape": "equal", "clusters": 96, "items": 960, "level": 0.05, "configurations": 5, "tasks": 2}
    assert measured("a harmful one is shipped, controls among them", shipped / TRIALS, **case) <= MOST


@pytest.mark.parametrize(
    ("levels", "claim"),
    [
        ([0.7] * 8, "kept skill covered, 8 equal bricks"),
        (list(np.linspace(0.5, 0.75, 8)), "kept skill covered, 8 bricks of 50 to 75 %"),
        ([0.8, 0.4], "kept skill covered, 2 unequal bricks"),
        ([0.7, 0.66], "kept skill covered, 2 near bricks"),
    ],
)
@pytest.mark.parametrize("k", [12, 24])
def test_a_configuration_that_keeps_all_of_its_best_brick(levels: list[float], claim: str, k: int) -> None:
    """The best brick is chosen by the same scores: the mean share that is kept, and how often its interval has the true one, 1."""
    rng, shares, covered = np.random.default_rng(len(levels)), [], 0
    gains = stats.norm.ppf([max(levels), *levels]) * (1 + 0.7**2 + 0.6**2 + 0.3**2) ** 0.5
    merge, *bricks = members(len(gains))
    merge = Configuration(merge.digest, merge.name, parents=tuple(c.name for c in bricks))
    for _ in range(TRIALS):
        _, kept = kept_of(tables(rng, gains, 1, False, 10 * k, k), merge, {c.name: c.digest for c in bricks})
        assert kept is not None
        assert None not in (kept.value, kept.low, kept.high)
        shares.append(kept.value)
        covered += kept.low <= 1 <= kept.high
    case = {"kind": "two-way", "shape": "equal", "clusters": k, "items": 10 * k, "level": 0.05, "configurations": len(levels)}
    assert measured(claim, covered / TRIALS, **case) >= 0.93 - 2.5 * (0.05 * 0.95 / TRIALS) ** 0.5
    assert float(np.mean(shares)) == pytest.approx(1, abs=0.03)
