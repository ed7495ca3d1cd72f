"""Levels of a sweep's points: against the configurations' own, with seeds against a direct computation, and their coverage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from worlds.decided import CLUSTERS
from worlds.swept import BRICKS, LAMBDA, METHOD, SEED, configuration, swept

from workbench.compare.leaders import MOST_MEMBERS
from workbench.compare.sweeps import _Measure
from workbench.compare.swept import SweepDimension
from workbench.compare.tables import Table
from workbench.recipe.sweep import MOST_POINTS
from workbench.scores.suite import Suite


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return swept(LAMBDA, METHOD, without=("mine[lambda=1.5,dare]",))


def test_a_point_has_the_levels_of_its_configuration(methods: Any) -> None:
    (sweep,) = methods.to_dict()["sweeps"]
    assert (sweep["name"], len(sweep["points"]), sweep["missing"]) == ("mine", 11, ["mine[lambda=1.5,dare]"])
    assert [(d["name"], d["number"], d["seed"]) for d in sweep["dimensions"]] == [
        ("mix.lambda", True, False),
        ("mix.merge", False, False),
    ]
    for point in sweep["points"]:
        (name,) = point["configurations"]
        own = configuration(methods, name)
        assert point["levels"]["mean"] == {**own["mean"], "between": None}
        facts = own["scores"]["facts"]
        assert point["levels"]["retention"] == {k: facts[k] for k in ("value", "low", "high")} | {"between": None}
    assert [(m["key"], m["baseline"], m["share"]) for m in sweep["measures"]] == [
        ("mean", pytest.approx(0.3), True),
        ("retention", pytest.approx(0.8), True),
    ]
    assert sweep["measures"][1]["text"] == "retention: facts"


def test_every_point_is_a_member_of_the_families_and_a_candidate(methods: Any) -> None:
    document = methods.to_dict()
    assert document["family"]["compared"] == 11 * 2
    assert document["recommendation"]["family"]["members"] == 15  # with two bricks and an average
    assert len(document["recommendation"]["candidates"]) == 14
    assert document["recommendation"]["configuration"] in ("mine[lambda=1,ties]", "mine[lambda=0.5,task_arithmetic]")
    assert configuration(methods, "mine[lambda=1,ties]")["recipe_text"] == "# the recipe of mine[lambda=1,ties]\n"


def test_the_largest_sweep_has_a_recommendation() -> None:
    assert MOST_POINTS == 64
    assert MOST_MEMBERS >= MOST_POINTS + 10, "room for the base, the bricks and an average"


def test_seeds_are_averaged_and_their_spread_is_in_the_interval(tmp_path: Path) -> None:
    """Against the formula written out for two tasks: clusters of equal size, so that the robust variance is that of cluster means."""
    comparison = swept(LAMBDA, SEED)
    (sweep,) = comparison.to_dict()["sweeps"]
    assert [len(p["configurations"]) for p in sweep["points"]] == [2] * 4
    assert [p["values"] for p in sweep["points"]] == [{"mix.lambda": v} for v in (0.25, 0.5, 1, 1.5)]
    for point in sweep["points"]:
        means = [configuration(comparison, name)["mean"]["value"] for name in point["configurations"]]
        level = point["levels"]["mean"]
        assert level["value"] == pytest.approx(np.mean(means), abs=1e-12)
        assert level["between"] == pytest.approx(np.std(means, ddof=1), abs=1e-12)
        assert level["low"] < level["value"] < level["high"]


def table(values: dict[str, np.ndarray[Any, Any]], clusters: int) -> Table:
    n = len(next(iter(values.values())))
    suite = Suite(suite="toy", tasks=("add",))
    cluster = np.arange(n) % clusters
    return Table("add", "acc", suite, "plan", [{"id": str(i)} for i in range(n)], cluster, values, {})


def test_the_interval_is_the_one_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    n, k, seeds = 120, 24, 3
    values = {str(s): rng.random(n) * 0.8 + 0.05 * s for s in range(seeds)}
    found = _Measure("mean", "", (table(values, k),), True).estimate(list(values))
    assert found is not None
    average = np.mean(list(values.values()), axis=0)
    by_cluster = average.reshape(-1, k).mean(0)
    items = by_cluster.var(ddof=1) / k
    levels = [v.mean() for v in values.values()]
    between = np.var(levels, ddof=1) / seeds
    df = (items + between) ** 2 / (items**2 / (k - 1) + between**2 / (seeds - 1))
    half = stats.t.ppf(0.975, df) * math.sqrt(items + between)
    assert found.value == pytest.approx(np.mean(levels))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-9)


@pytest.mark.parametrize(("seeds", "by_seed"), [(2, 0.0), (3, 0.03), (5, 0.06)])
def test_the_interval_covers_the_mean_over_items_and_seeds(seeds: int, by_seed: float) -> None:
    """Scores with an effect of the item, one of the seed, and one of both: at least 93 of 100 intervals hold the true mean."""
    rng = np.random.default_rng(seeds)
    held, repetitions, n = 0, 400, 60
    for _ in range(repetitions):
        item, seed = 0.2 * rng.normal(size=n), by_seed * rng.normal(size=(seeds, 1))
        scores = 0.5 + item + seed + 0.1 * rng.normal(size=(seeds, n))
        values = {str(s): line for s, line in enumerate(scores)}
        found = _Measure("mean", "", (table(values, n),), False).estimate(list(values))
        assert found is not None
        held += found.low <= 0.5 <= found.high
    assert 0.93 <= held / repetitions <= 0.995


def test_equal_seeds_have_the_spread_of_the_items_alone() -> None:
    values = {s: (np.arange(100) % 3 == 0).astype(float) for s in ("0", "1")}
    found = _Measure("mean", "", (table(values, 50),), True).estimate(["0", "1"])
    assert found is not None
    assert found.between == 0
    assert found.low < found.value < found.high
    perfect = _Measure("mean", "", (table({s: np.ones(100) for s in ("0", "1")}, 50),), True).estimate(["0", "1"])
    assert perfect is not None
    assert perfect.low < 0.99, "100 of 100 right is not a proof"
    graded = _Measure("mean", "", (table({s: np.full(100, 0.5) for s in ("0", "1")}, 50),), True).estimate(["0", "1"])
    assert graded is not None
    assert (graded.value, graded.low, graded.high, graded.between) == (0.5, 0.5, 0.5, 0.0), "nothing varies"


def test_a_list_of_bricks_is_a_number() -> None:
    assert BRICKS.number
    assert not METHOD.number
    assert not SweepDimension("mix.bricks", "bricks", (("a", "b"), ("a", "c"))).number, "two places are the same"
    assert not SweepDimension("mix.normalize", "normalize", (True, False)).number
    assert SEED.seed
    assert CLUSTERS >= 20
