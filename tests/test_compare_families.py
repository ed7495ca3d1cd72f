"""Which rows of a comparison are tested together, and guarded tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from metric_scores import BASE, SUITE, A, B, data, stored

from workbench.compare import compare
from workbench.comparison.differences import differences
from workbench.scores import Configuration, Store
from workbench.suites import Suite
from workbench.tables import Table


def test_ten_clusters_decide_in_a_large_family(tmp_path: Path) -> None:
    """64 configurations on ten clusters: Holm leaves no p that ten clusters can reach, joint sign flips find the one that is better."""
    family = {Configuration(f"{i:012d}{0:020d}", f"c{i}"): data(i, error=0.4) for i in range(3, 66)}
    store = Store(tmp_path)
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
    assert row.reason.startswith("no verdict can fall: with all 8 clusters on one side p is still 0.")
    assert row.needs is None


def test_a_guarded_task_is_safe_worse_or_neither(tmp_path: Path) -> None:
    store = Store(tmp_path)
    others = {Configuration(f"{i:012d}{0:020d}", f"c{i}"): data(i, facts=0.86) for i in range(3, 20)}
    rows = compare(store, stored(store, {BASE: data(), A: data(1, facts=0.85), B: data(1, facts=0.9), **others})).rows
    alone = compare(Store(tmp_path / "one"), stored(Store(tmp_path / "one"), {BASE: data(), A: data(1, facts=0.85)})).rows
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
