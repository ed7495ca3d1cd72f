"""Rows of a comparison are tested in families; guarded tasks have verdicts of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.metric_scores import BASE, SUITE, A, B, data, stored

from workbench.compare.compare import compare
from workbench.compare.differences import differences
from workbench.compare.families import Ruling, excluded
from workbench.compare.tables import Table
from workbench.scores.paired import paired
from workbench.scores.statistics import codes
from workbench.scores.store import Configuration, ScoreStore
from workbench.scores.suite import Suite


def test_ten_clusters_decide_in_a_large_family(tmp_path: Path) -> None:
    """64 configurations on ten clusters: Holm leaves no p that ten clusters can reach, joint sign flips find the one that is better."""
    family = {Configuration(f"{i:012d}{0:020d}", f"c{i}"): data(i, error=0.4) for i in range(3, 66)}
    store = ScoreStore(tmp_path)
    result = compare(store, stored(store, {BASE: data(), A: data(1, error=0.1), **family}, clusters=10))
    row = next(r for r in result.rows if (r.configuration, r.task) == ("a", "told"))
    assert row.verdict == "better"
    assert row.p * 64 > 0.05 >= row.p_adj


def test_where_no_verdict_can_fall_the_row_says_so(tmp_path: Path) -> None:
    """Eight clusters a task and very many tasks: even eight clusters on one side are matched by chance somewhere."""
    rng, names = np.random.default_rng(0), [f"t{i}" for i in range(40)]
    suite, cluster = Suite(suite="s", tasks=tuple(names)), np.arange(80) // 10
    tables = []
    for name in names:
        before = rng.normal(size=80)
        after = before + 1 + 0.001 * rng.normal(size=80)
        tables.append(Table(name, "x", suite, "p", [{}] * 80, cluster, {BASE.digest: before, A.digest: after}, {}))
    row = differences(tables, BASE, [A], 0.01)[0]
    assert row.verdict == "cannot tell"
    assert row.reason is not None
    assert row.reason.startswith(
        "no difference can be significant: even if all 8 changed clusters had changed in the same direction, the adjusted p would be 0."
    )
    assert row.needs is None


def test_a_guarded_task_is_safe_worse_or_neither(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    others = {Configuration(f"{i:012d}{0:020d}", f"c{i}"): data(i, facts=0.86) for i in range(3, 20)}
    rows = compare(store, stored(store, {BASE: data(), A: data(1, facts=0.85), B: data(1, facts=0.9), **others})).rows
    alone = compare(
        ScoreStore(tmp_path / "one"), stored(ScoreStore(tmp_path / "one"), {BASE: data(), A: data(1, facts=0.85)})
    ).rows
    facts = {r.configuration: r for r in rows if r.task == "facts"}
    (only,) = (r for r in alone if r.task == "facts")
    assert facts["a"].family == "guarded"
    assert (facts["a"].p_adj, facts["a"].verdict) == (only.p_adj, only.verdict)  # company does not quieten an alarm
    assert facts["a"].low_adj <= only.low_adj  # but an all-clear is harder to get
    wide = compare(
        store, stored(store, {BASE: data(), A: data(1, facts=0.85)}, suite=SUITE.model_copy(update={"tolerance": 0.2}))
    ).rows
    (safe,) = (r for r in wide if r.task == "facts")
    assert (safe.verdict, safe.tolerance) == ("safe", 0.2)
    assert safe.low_adj > -0.2


def table(values: Any, cluster: Any, *, role: str = "skill", lower: bool = False, **suite: Any) -> Table:
    """A task's scores of the base and of A, B."""
    digests = [BASE.digest, A.digest, B.digest]
    found = Suite(suite="s", tasks=("t",), roles={"t": role}, **suite)  # type: ignore[dict-item]
    return Table(
        "t",
        "acc",
        found,
        "p",
        [{}] * len(cluster),
        codes(list(cluster)),
        dict(zip(digests, values, strict=False)),
        {},
        lower=lower,
    )


def test_controls_do_not_count_in_the_family() -> None:
    """A recipe's row is the same whether bricks and averages stand beside it or not."""
    rng, cluster = np.random.default_rng(1), np.arange(240) // 10
    base = (rng.random(240) < 0.5) * 1.0
    names = [Configuration(f"{i:032d}", f"brick{i}", "brick") for i in range(3, 23)]
    values = {BASE.digest: base, A.digest: np.where(rng.random(240) < 0.1, 1.0, base)}
    values |= {c.digest: np.where(rng.random(240) < 0.2, 1 - base, base) for c in names}
    suite = Suite(suite="s", tasks=("t",))
    made = Table("t", "acc", suite, "p", [{}] * 240, cluster, values, {})
    (alone,) = differences([made], BASE, [A], 0.05)
    together = differences([made], BASE, [*names, A], 0.05)
    assert next(row for row in together if row.configuration == "a") == alone
    assert {row.family for row in together if row.role == "brick"} == {"controls"}
    assert alone.verdict == "better"


def test_equivalent_is_read_off_the_adjusted_interval() -> None:
    """The plain interval lies within the margin, the one that holds for all rows at once does not."""
    rng, cluster = np.random.default_rng(2), np.arange(2000) // 4
    base = (rng.random(2000) < 0.5) * 1.0
    others = [Configuration(f"{i:032d}", f"c{i}") for i in range(1, 21)]
    values = {c.digest: np.where(rng.random(2000) < 0.05, 1 - base, base) for c in others} | {BASE.digest: base}
    rows = differences(
        [Table("t", "acc", Suite(suite="s", tasks=("t",)), "p", [{}] * 2000, cluster, values, {})], BASE, others, 0.05
    )
    fooled = [row for row in rows if row.low > -0.02 and row.high < 0.02 and not (row.low_adj > -0.02 and row.high_adj < 0.02)]
    assert fooled
    assert {row.verdict for row in fooled} == {"cannot tell"}
    assert any(row.verdict == "equivalent" for row in rows)
    assert all(row.low_adj <= row.low and row.high <= row.high_adj for row in rows)


@pytest.mark.parametrize("role", ["skill", "guarded"])
def test_one_cluster_says_nothing(role: str) -> None:
    (row,) = differences([table([np.zeros(10), np.ones(10)], [0] * 10, role=role)], BASE, [A], 0.05)
    assert row.verdict == ("cannot tell" if role == "skill" else "not shown safe")
    assert row.reason == "too few clusters: 1, at least 8 needed"
    assert (row.low, row.high) == (-1.0, 1.0)


def test_equal_answers_are_not_tested() -> None:
    ones = np.ones(12)
    (row,) = differences([table([ones, ones], range(12), min_effect=0.0)], BASE, [A], 0.05)
    assert (row.verdict, row.low, row.high, row.p_adj, row.mde, row.needs) == ("no item changed", 0.0, 0.0, 1.0, None, None)


def test_changes_that_cancel_within_clusters() -> None:
    """Items changed, no cluster's sum did: nothing is rejected, and p is 1."""
    before, after = np.tile([1.0, 0.0], 10), np.tile([0.0, 1.0], 10)
    (row,) = differences([table([before, after], np.arange(20) // 2)], BASE, [A], 0.05)
    assert (row.verdict, row.p, row.diff) == ("cannot tell", 1.0, 0.0)
    assert row.low < -0.1 < 0.1 < row.high  # as wide as for independent items


def test_a_margin_of_zero_is_never_reached() -> None:
    rng = np.random.default_rng(3)
    before = (rng.random(200) < 0.5) * 1.0
    after = np.where(rng.random(200) < 0.1, 1 - before, before)
    (row,) = differences([table([before, after], range(200), min_effect=0.0)], BASE, [A], 0.05)
    assert row.verdict == "cannot tell"
    (row,) = differences([table([before, after], range(200), min_effect=0.0, role="guarded")], BASE, [A], 0.05)
    assert row.verdict == "not shown safe"
    assert row.needs is None  # no number of items shows that a loss is below 0
    (row,) = differences([table([np.zeros(200), after], range(200), min_effect=0.0, role="guarded")], BASE, [A], 0.05)
    assert row.verdict == "safe"  # it got better


def test_a_family_of_500() -> None:
    rng, cluster = np.random.default_rng(4), np.arange(500) // 10
    others = [Configuration(f"{i:032d}", f"c{i}") for i in range(1, 501)]
    base = (rng.random(500) < 0.5) * 1.0
    values = {c.digest: np.where(rng.random(500) < 0.1, 1 - base, base) for c in others} | {BASE.digest: base}
    values[others[7].digest] = np.maximum(base, rng.random(500) < 0.3)
    rows = differences(
        [Table("t", "acc", Suite(suite="s", tasks=("t",)), "p", [{}] * 500, cluster, values, {})], BASE, others, 0.05
    )
    assert [row.configuration for row in rows if row.verdict == "better"] == ["c8"]


def lost(share: float, n: int = 600) -> list[Any]:
    """Right answers, and the same with some of them lost, spread over clusters of ten."""
    return [np.ones(n), (np.random.default_rng(9).permutation(n) >= share * n) * 1.0]


def test_an_alarm_beside_many_others_has_an_interval_below_0() -> None:
    """The loss is found among the configuration's own guarded tasks; the lower end holds for all rows at once."""
    rng, cluster = np.random.default_rng(10), np.arange(300) // 10
    base = (rng.random(300) < 0.5) * 1.0
    others = [Configuration(f"{i:032d}", f"c{i}") for i in range(1, 60)]
    values = {c.digest: np.where(rng.random(300) < 0.1, 1 - base, base) for c in others} | {BASE.digest: base}
    suite = Suite(suite="s", tasks=("t",), roles={"t": "guarded"})
    rows = differences([Table("t", "acc", suite, "p", [{}] * 300, cluster, values, {})], BASE, others, 0.05)
    alarms = [row for row in rows if row.verdict == "worse"]
    assert alarms  # of 59 without a difference some are alarms at 5 % each
    assert all(row.p_adj == row.p <= 0.05 and row.low_adj < row.low < row.high_adj < 0 for row in alarms)


def test_the_adjusted_interval_of_one_row_is_the_plain_one() -> None:
    """Also where one cluster holds half of the items, so that sign flips give small critical values."""
    rng, cluster = np.random.default_rng(12), np.r_[np.zeros(100), np.arange(1, 21).repeat(5)].astype(int)
    before = np.r_[np.zeros(100), rng.random(100) < 0.5]
    after = np.r_[np.ones(50), np.zeros(50), np.where(rng.random(100) < 0.2, 1 - before[100:], before[100:])]
    (row,) = differences([table([before, after], cluster)], BASE, [A], 0.05)
    assert (row.low_adj, row.high_adj) == (row.low, row.high)


def test_needs_of_a_guarded_task_counts_from_the_loss_that_was_seen() -> None:
    values = lost(0.03)
    found = table(values, np.arange(600) // 10, role="guarded", tolerance={"t": 0.05}, drawn="items")
    (row,) = differences([found], BASE, [A], 0.05)
    assert (row.tolerance, row.verdict) == (0.05, "safe")
    few = table(values, np.arange(600) // 10, role="guarded", tolerance={"t": 0.05})
    assert [row.verdict for row in differences([few], BASE, [A], 0.05)] == ["worse"]  # 60 clusters say nothing of a rare loss
    near = table(values, np.arange(600) // 10, role="guarded", tolerance=0.035)
    (row,) = differences([near], BASE, [A], 0.05)
    assert row.verdict == "worse"
    mixed = [np.r_[np.ones(300), np.zeros(300)], np.r_[np.ones(291), np.zeros(9), np.ones(3), np.zeros(297)]]
    cluster = np.random.default_rng(1).permutation(600) // 10
    (row,) = differences([table(mixed, cluster, role="guarded", tolerance=0.02)], BASE, [A], 0.05)
    pair = near.paired(BASE.digest, A.digest), table(mixed, cluster).paired(BASE.digest, A.digest)
    assert row.verdict == "not shown safe"
    assert row.needs == pair[1].needs(0.02 - 0.01)


@pytest.mark.parametrize(("side", "verdict"), [(1, "worse"), (-1, "safe")])
def test_guarded_errors_must_not_rise(side: int, verdict: str) -> None:
    """A rise is a loss on tasks whose scores are better when they are lower."""
    rng = np.random.default_rng(13)
    before = rng.random(200)
    after = before + side * 0.1 + 0.01 * rng.normal(size=200)
    found = table([before * 5, after * 5], range(200), role="guarded", lower=True, tolerance={"t": 0.1})
    (row,) = differences([replace(found, metric="nll")], BASE, [A], 0.05)
    assert row.verdict == verdict
    assert (row.diff > 0) == (side > 0)


def test_bricks_are_tested_apart_from_averages() -> None:
    """A brick's row is that of the interference matrix, whatever averages are shown."""
    rng, cluster = np.random.default_rng(14), np.arange(240) // 10
    base = (rng.random(240) < 0.5) * 1.0
    brick = Configuration("8" * 32, "brick", "brick")
    averages = [Configuration(f"{i:032d}", f"average{i}", "average") for i in range(10)]
    values = {c.digest: np.where(rng.random(240) < 0.1, 1 - base, base) for c in (brick, *averages)} | {BASE.digest: base}
    made = Table("t", "acc", Suite(suite="s", tasks=("t",)), "p", [{}] * 240, cluster, values, {})
    assert differences([made], BASE, [brick, *averages], 0.05)[0] == differences([made], BASE, [brick], 0.05)[0]


def test_a_margin_is_excluded_by_the_interval_and_by_what_few_clusters_may_hide() -> None:
    many, few = (paired(np.ones(n), np.ones(n)) for n in (400, 20))
    assert excluded(many, (-0.019, 0.019), 0.02, 0.025)
    for ends in ((-0.02, 0.0), (0.0, 0.02), (-0.03, 0.0), (0.0, 0.03)):
        assert not excluded(many, ends, 0.02, 0.025)
    assert not excluded(few, (0.0, 0.0), 0.02, 0.025)
    gained = paired(np.zeros(400), np.r_[np.ones(20), np.zeros(380)])
    assert not excluded(gained, (-0.01, 0.01), 0.02, 0.025), "a rise as large as the margin is what was seen"


def test_an_interval_excludes_0_by_its_own_p() -> None:
    for p, interval_p, expected in ((0.05, None, True), (0.051, None, False), (0.01, 0.051, False), (0.2, 0.05, True)):
        assert Ruling(p, 2.0, 2.0, 0.0, interval_p=interval_p).excludes_zero(0.05) is expected


def test_a_gain_on_a_guarded_task_has_the_interval_of_its_family() -> None:
    """Its p is that of its own guarded tasks; among 30 noisy others, the interval that decides "safe" still includes 0."""
    rng, n = np.random.default_rng(0), 200
    suite = Suite(suite="s", tasks=("t",), roles={"t": "guarded"})
    before = rng.integers(0, 2, n).astype(float)
    gained = np.where((before == 0) & (np.arange(n) % 10 == 0), 1.0, before)
    others = [Configuration(f"{i:012d}{0:020d}", f"c{i}") for i in range(3, 33)]
    flipped = {c.digest: np.where(rng.random(n) < 0.1, 1 - before, before) for c in others}
    table = Table("t", "acc", suite, "p", [{}] * n, np.arange(n), {BASE.digest: before, A.digest: gained, **flipped}, {})
    row = next(r for r in differences([table], BASE, [A, *others], 0.05) if r.configuration == "a")
    assert row.wins >= 6
    assert row.losses == 0
    assert row.p_adj is not None
    assert row.p_adj <= 0.05
    assert row.low_adj is not None
    assert row.low_adj <= 0
