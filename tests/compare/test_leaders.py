"""Pairs of configurations on the mean over skills: their family, their verdicts, and a difference from its other side."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.compare import leaders
from workbench.compare.families import Ruling, skewed
from workbench.compare.leaders import MeanDifference, MeanPairs, MeanVerdict, pair_of
from workbench.compare.tables import Table
from workbench.scores.statistics import FEW_CLUSTERS
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite
from workbench.scores.unseen import alone, standings

ONE, TWO, THREE = (Configuration(f"{i:012d}{0:020d}", name) for i, name in enumerate(("one", "two", "three"), 1))


def tables(values: list[list[Any]], clusters: list[Any], chance: float = 0.0, **settings: Any) -> list[Table]:
    """Tables of skill tasks t0, t1, ...: values[task][configuration] are the items' scores."""
    names = tuple(f"t{i}" for i in range(len(values)))
    suite = Suite(suite="s", tasks=names, chance=dict.fromkeys(names, chance), **settings)
    return [
        Table(
            name,
            "acc",
            suite,
            "p",
            [{}] * len(cluster),
            np.asarray(cluster),
            dict(zip((c.digest for c in (ONE, TWO, THREE)), rows, strict=True)),
            {},
        )
        for name, rows, cluster in zip(names, values, clusters, strict=True)
    ]


def test_the_largest_pair_is_held_against_all_pairs_under_all_sign_flips() -> None:
    """An independent count: 2^11 patterns over the clusters of two tasks, the largest statistic of three pairs, ties half."""
    rng, chance = np.random.default_rng(3), 0.25
    clusters = [np.arange(50) // 10, np.arange(36) // 6]
    levels = (0.5, 0.56, 0.68)
    values = [[(rng.random(len(cluster)) < level) * 1.0 for level in levels] for cluster in clusters]
    pairs = MeanPairs(tables(values, clusters, chance), (ONE, TWO, THREE), 0.05)
    sums = []
    for a, b in combinations(range(3), 2):
        parts = [np.bincount(c, v[a] - v[b]) / len(c) / 2 / (1 - chance) for v, c in zip(values, clusters, strict=True)]
        sums.append(np.concatenate(parts))
    table = np.array(sums)  # [pairs, clusters]
    squares = [
        sum(((v[a] - v[b]) ** 2).sum() / (2 * (1 - chance) * len(c)) ** 2 for v, c in zip(values, clusters, strict=True))
        for a, b in combinations(range(3), 2)
    ]
    scale = np.sqrt(np.maximum((table**2).sum(1), squares))
    seen = np.abs(table.sum(1)) / scale
    largest = np.array([np.abs(table @ signs / scale).max() for signs in product((1, -1), repeat=11)])
    expected = ((largest > seen.max() + 1e-4).mean() + (largest >= seen.max() - 1e-4).mean()) / 2
    one, other = list(combinations((ONE, TWO, THREE), 2))[int(seen.argmax())]
    found = pairs.between(one.name, other.name)
    changes = [
        pair_of(tables(values, clusters, chance), a.digest, b.digest).changes for a, b in combinations((ONE, TWO, THREE), 2)
    ]
    left = standings(changes, [expected] * 3, [0.02] * 3, ["mean"] * 3, 0.05)[int(seen.argmax())].p
    assert found.p == pytest.approx(max(expected, left if expected <= 0.05 else 0), abs=1e-3)
    assert found.diff == pytest.approx(table.sum(1)[int(seen.argmax())], abs=1e-12)
    assert pairs.between(other.name, one.name) == found.mirrored()
    margins = tables(values, clusters, chance, min_effect={"t0": 0.06, "t1": 0.15})
    assert MeanPairs(margins, (ONE, TWO), 0.05).margin == pytest.approx((0.06 + 0.15) / 0.75 / 2)


@pytest.mark.parametrize(
    ("verdict", "other"), [("better", "worse"), ("worse", "better"), ("equivalent", "equivalent"), ("cannot tell", "cannot tell")]
)
def test_a_difference_from_the_other_side(verdict: MeanVerdict, other: MeanVerdict) -> None:
    own = {"configuration": "a", "against": "b", "diff": 0.25, "low": None, "high": 0.5, "p": 0.03, "needs": 7, "reason": "few",
           "stands_up_to": 0.4}  # fmt: skip
    found = MeanDifference.model_validate({**own, "verdict": verdict}).mirrored()
    turned = {"configuration": "b", "against": "a", "diff": -0.25, "low": -0.5, "high": None, "verdict": other}
    assert found.to_dict() == {**own, **turned}
    assert found.mirrored().to_dict() == {**own, "verdict": verdict}
    none = found.model_copy(update={"diff": 0.0, "low": 0.0}).mirrored()
    assert f"{none.diff} {none.high}" == "0.0 0.0", "no difference has no sign"


def test_the_family_covers_every_pair_and_not_the_leaders_alone(tmp_path: Path) -> None:
    """The best and the worst of twenty equal configurations differ by chance: a test of these two rejects, that of all pairs does not."""
    rng, cluster = np.random.default_rng(1), np.arange(240) // 10
    members = [Configuration(f"{i:012d}{0:020d}", f"c{i}") for i in range(1, 21)]
    suite = Suite(suite="s", tasks=("t",))
    values: dict[str, Any] = {c.digest: (rng.random(240) < 0.5) * 1.0 for c in members}
    made_table = Table("t", "acc", suite, "p", [{}] * 240, cluster, values, {})
    pairs = MeanPairs([made_table], members, 0.05)
    ranked = sorted(members, key=lambda c: -pairs.means[c.name])
    naive = MeanPairs([made_table], [ranked[0], ranked[-1]], 0.05).between(ranked[0].name, ranked[-1].name)
    honest = pairs.between(ranked[0].name, ranked[-1].name)
    assert naive.verdict == "better"
    assert honest.verdict == "cannot tell"
    assert honest.p > 5 * naive.p
    assert honest.low < naive.low < naive.high < honest.high
    assert pairs.leaders([c.name for c in members]) == [c.name for c in ranked]


def judged(share: float, other: float, clusters: int = 40, n: int = 800, **settings: Any) -> MeanDifference:
    """The difference of two configurations that answer these shares of two tasks; the second task has forty clusters."""
    marks = [(np.arange(n) * 7 % n < level * n) * 1.0 for level in (share, other, share)]
    both = [np.arange(n) % k for k in (clusters, 40)]
    return MeanPairs(tables([marks, marks], both, **settings), (ONE, TWO), 0.05).between("one", "two")


def test_verdicts_on_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    better, worse, alike = judged(0.7, 0.5), judged(0.5, 0.7), judged(0.5, 0.5)
    assert (better.verdict, worse.verdict, better.needs, better.reason) == ("better", "worse", None, None)
    assert (better.diff, worse.diff) == (pytest.approx(0.2), pytest.approx(-0.2))
    assert (alike.verdict, alike.low, alike.high) == ("no item changed", 0.0, 0.0)
    items: dict[str, Any] = {"drawn": "items", "min_effect": 0.05}
    assert (judged(0.5, 0.5, **items).verdict, judged(0.5, 0.505, **items).verdict) == ("equivalent", "equivalent")
    few = f"too few clusters: t0 has {FEW_CLUSTERS - 1}, at least {FEW_CLUSTERS} needed"
    assert [judged(a, b, FEW_CLUSTERS - 1, **items).verdict for a, b in ((0.7, 0.5), (0.5, 0.5))] == [
        "cannot tell",
        "no item changed",
    ]
    assert judged(0.7, 0.5, FEW_CLUSTERS - 1).reason == few
    assert judged(0.7, 0.5, FEW_CLUSTERS).verdict == "better"


def test_verdicts_at_their_bounds() -> None:
    """From the family's ruling: at alpha it counts, at the margin it does not; more items are named where more are needed."""
    marks = [(np.arange(400) * 7 % 400 < level * 400) * 1.0 for level in (0.51, 0.5, 0.5)]
    skills = tables([marks], [np.arange(400) // 10], drawn="items", min_effect=0.06)
    pairs, pair = MeanPairs(skills, (ONE, TWO), 0.05), pair_of(skills, ONE.digest, TWO.digest)

    def judged(ends: tuple[float, float] = (-0.5, 0.5), critical: float = 2.0, **p: float) -> tuple[Any, ...]:
        standing = replace(alone(pair.changes), tested=p.pop("flipped", 0.5))
        ruling = Ruling(**{"p": 0.5, "least": 0.01, **p}, critical=critical, first=critical, standing=standing)
        return pairs._judged(("one", "two"), ends, pair, ruling)

    def needs(critical: float) -> int | None:
        return pair.needs(0.06, critical, alone(pair.changes), 0.05)

    assert (judged(p=0.05), judged(p=0.0501)[0]) == (("better", None, None), "cannot tell")
    assert judged((-0.049, 0.059)) == ("equivalent", None, None)
    assert [judged(ends)[0] for ends in ((-0.06, 0.059), (-0.049, 0.06))] == ["cannot tell"] * 2
    assert judged(flipped=0.05) == ("cannot tell", skewed(40), pair.needs_to_stand(alone(pair.changes), 0.05))
    assert str(judged(least=0.0501)[1]).startswith("no difference can be significant")
    assert judged(flipped=0.0501, least=0.05) == judged() == ("cannot tell", None, None), "400 items are more than are needed"
    assert judged(critical=6.0) == ("cannot tell", None, needs(6.0))
    assert (needs(2.0) or 0) < 400 < (needs(6.0) or 0)


def test_pairs_are_tested_up_to_a_number_of_members(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [(np.arange(80) * 7 % 80 < level * 80) * 1.0 for level in (0.5, 0.6, 0.7)]
    skills = tables([marks], [np.arange(80) // 4])
    for most, size in ((3, 3), (2, 0)):
        monkeypatch.setattr(leaders, "MOST_MEMBERS", most)
        pairs = MeanPairs(skills, (ONE, TWO, THREE), 0.05)
        assert (pairs.members, pairs.size) == (3, size)
    assert MeanPairs(skills, (ONE, TWO, THREE), 0.05, ONE).size == 2, "each against the baseline"
    reason = "pairs are tested among 2 configurations at most, and these are 3"
    left = pairs.between("one", "three")
    assert (left.verdict, left.reason, left.low, left.high, left.p, left.diff) == (
        "cannot tell",
        reason,
        None,
        None,
        1.0,
        pytest.approx(-0.2),
    )
    assert pairs.leaders(["one", "two", "three"]) == ["three", "two", "one"]
