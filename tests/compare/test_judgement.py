"""The verdict on one row from its family's ruling: each branch at its bounds, with the reason and the number of items that would decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from workbench.compare import differences, families
from workbench.compare.families import Ruling, skewed
from workbench.compare.tables import Table
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite
from workbench.scores.unseen import alone

BASE, ONE = (Configuration(f"{i:012d}{0:020d}", name) for i, name in enumerate(("base", "one"), 1))
CRITICAL = 1.9


def cell(
    rises: Sequence[int], falls: Sequence[int] = (), clusters: int = 20, lower: bool = False, unit: float = 1.0, **suite: Any
) -> Any:
    """Ten items a cluster, the first half right; those of some clusters' first item rise or fall."""
    before = np.tile([0.0, 1.0], 5 * clusters).reshape(clusters, 10)
    after = before.copy()
    after[list(rises), 0], after[list(falls), 1] = 1, 0
    cluster, values = np.arange(clusters).repeat(10), {BASE.digest: before.ravel() * unit, ONE.digest: after.ravel() * unit}
    found = Suite(suite="s", tasks=("t",), **suite)
    table = Table("t", "acc", found, "p", [{}] * cluster.size, cluster, values, {}, lower=lower)
    return families.TestedCell(ONE, table, table.paired(BASE.digest, ONE.digest), BASE.digest)


def ruling(found: Any, p: float = 0.5, flipped: float = 0.5, least: float = 0.01) -> Ruling:
    return Ruling(p, CRITICAL, CRITICAL, least, replace(alone(found.pair.changes), tested=flipped))


def compared(found: Any, ends: tuple[float, float] = (-0.5, 0.5), **p: float) -> tuple[str, str | None, int | None]:
    return differences._compared(found, ruling(found, **p), ends, 0.05)


def guarded(found: Any, ends: tuple[float, float] = (-0.5, 0.5), **p: float) -> tuple[str, str | None, int | None]:
    return differences._guarded(found, ruling(found, **p), ends, 0.05)


def needs(found: Any, effect: float) -> int | None:
    """The number of items that the row's p needs, not its interval."""
    found_needs = found.pair.needs(effect, CRITICAL, alone(found.pair.changes), 0.05)
    assert found_needs is None or isinstance(found_needs, int)
    return found_needs


MANY = range(12)
NONE = "the adjusted interval includes 0, and the suite gives no min_effect for this metric"
WIDE = "the adjusted interval includes 0 and a difference as large as the smallest effect of interest"
HIDDEN = "20 clusters do not exclude a large difference on a few clusters that were not drawn"


def test_better_or_worse() -> None:
    up, down = cell(MANY), cell((), MANY)
    assert [compared(one, p=0.05)[0] for one in (up, down)] == ["better", "worse"]
    assert [compared(cell(r, f, lower=True), p=0.05)[0] for r, f in ((MANY, ()), ((), MANY))] == ["worse", "better"]
    assert compared(up, p=0.0501)[0] == "cannot tell"
    assert compared(cell(()), p=0.01) == ("no item changed", None, None)
    few = cell(range(5), clusters=7)
    assert compared(few, p=0.01) == ("cannot tell", "too few clusters: 7, at least 8 needed", few.pair.needs(few.pair.diff))
    assert compared(cell(range(5), clusters=8), p=0.01)[0] == "better"


def test_equivalent_or_not_told() -> None:
    items: dict[str, Any] = {"drawn": "items", "min_effect": 0.05}
    near = cell((0,), (1,), **items)
    assert compared(near, (-0.049, 0.049)) == ("equivalent", None, None)
    for ends in ((-0.05, 0.049), (-0.049, 0.05)):
        assert compared(near, ends) == ("cannot tell", WIDE, needs(near, 0.05))
    more = near.pair.needs_to_stand(alone(near.pair.changes), 0.05)
    assert compared(near, (-0.5, 0.5), flipped=0.05) == ("cannot tell", skewed(20), more)
    assert compared(near, (-0.049, 0.049), flipped=0.05)[0] == "equivalent"
    assert compared(near, flipped=0.0501)[1] == WIDE
    rare = cell((0, 1, 2), min_effect=0.05)
    sides = [rare.drawn.needs_to_exclude(0.05, side, ruling(rare).level(rare.pair)) for side in (-1, 1)]
    assert sides[0] < sides[1], "a rise is less far from what was seen"
    assert compared(rare, (-0.049, 0.049)) == ("cannot tell", HIDDEN, sides[1])
    tight = cell(range(10), min_effect=0.0501)  # a mean of 0.05
    assert compared(tight, (0.0, 0.05)) == ("cannot tell", HIDDEN, None)
    free = cell((0, 1), unit=5.0)
    assert compared(free) == ("cannot tell", NONE, needs(free, free.pair.diff))
    for large in (cell(MANY, min_effect=0.01), cell((), (0, 1, 2), min_effect=0.001)):
        assert compared(large)[2] == needs(large, abs(large.pair.diff))


def test_no_difference_can_be_significant() -> None:
    """Only where at least half of the clusters changed: else more items help as well."""
    for changed, said in ((10, True), (9, False)):
        found = compared(cell(range(changed)), least=0.051)
        assert (found[1] or "").startswith("no difference can be significant") == said
        if said:
            assert "even if all 10 changed clusters had changed in the same direction, the adjusted p would be 0.051" in str(
                found[1]
            )
            assert found[2] is None
    assert compared(cell(MANY), least=0.05)[1] == WIDE


@pytest.mark.parametrize("lower", [False, True])
def test_harm(lower: bool) -> None:
    """A fall is a loss, or a rise where lower scores are better."""

    def change(*clusters: int, **suite: Any) -> Any:
        given = {"roles": {"t": "guarded"}, "tolerance": {"t": 0.05}, **suite}
        return cell(clusters, (), lower=True, **given) if lower else cell((), clusters, **given)

    def ends(best: float, worst: float) -> tuple[float, float]:
        return (-best, worst) if lower else (-worst, best)

    items = change(0, drawn="items")
    assert guarded(items, ends(0.01, 0.049)) == ("safe", None, None)
    assert guarded(items, ends(0.01, 0.049), p=0.05)[0] == "safe", "a loss below the tolerance may be shown"
    wide = "the adjusted interval includes a loss as large as the tolerance"
    assert guarded(items, ends(0.01, 0.05)) == ("not shown safe", wide, items.pair.needs(0.05 - 0.005, CRITICAL))
    lost = change(*MANY)  # a loss of 6 points
    assert guarded(lost, ends(0.0, 0.1), p=0.05) == ("worse", None, None)
    assert guarded(lost, ends(0.0, 0.1), p=0.0501) == ("not shown safe", wide, None)
    for p, alarm in (
        (0.05, True),
        (0.0501, False),
    ):  # the interval says what the verdict says, whatever the other rows leave of it
        row = differences._difference(lost, replace(ruling(lost, p=p, flipped=p), interval_p=0.5), BASE, 0.05)
        low, high = (row.low_adj, row.high_adj) if lower else (-(row.high_adj or 0.0), -(row.low_adj or 0.0))
        assert (row.verdict, (low or 0.0) > 0, (high or 0.0) > 0.06) == ("worse" if alarm else "not shown safe", alarm, True)
    gained = cell(MANY, (), roles={"t": "guarded"}) if not lower else cell((), MANY, lower=True, roles={"t": "guarded"})
    assert guarded(gained, ends(0.1, 0.3), p=0.01)[0] == "not shown safe"
    rare = change(0)
    more = rare.drawn.needs_to_exclude(0.05, 1 if lower else -1, ruling(rare).level(rare.pair))
    said = "20 clusters do not exclude a large loss on a few clusters that were not drawn"
    assert guarded(rare, ends(0.0, 0.049)) == ("not shown safe", said, more)
    assert guarded(change(), ends(0.0, 0.049))[1] == f"no item changed, but {said}"
    few_items = "80 items do not exclude a large loss on a few items that were not drawn"
    assert guarded(change(0, clusters=8, drawn="items", tolerance=0.02), ends(0.0, 0.019))[1] == few_items
    free = "the metric has no range: the suite's `worst` must give the largest loss of a cluster"
    assert guarded(change(0, unit=5.0), ends(0.0, 0.01))[1] == free
    unknown = change(0, unit=5.0, tolerance=0.05)
    assert guarded(unknown) == ("not shown safe", "the suite gives no tolerance for this metric", None)
    few = change(0, clusters=7)
    more = few.pair.needs(abs(few.pair.diff))
    assert guarded(few, ends(0.0, 0.01), p=0.01) == ("not shown safe", "too few clusters: 7, at least 8 needed", more)
    assert "too few" not in str(guarded(change(0, clusters=8), ends(0.0, 0.01))[1])
    same = change(clusters=7)
    assert guarded(same)[2] == 200, "twenty clusters of ten items"
