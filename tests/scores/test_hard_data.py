"""How often verdicts err where data are hard: skewed differences, harm in few clusters, items that did not change.

`python benchmarks/error_rates.py --of hard-data` runs this file with more trials. Beside each rate stands that of the sign flips, or of Tango's
interval, alone.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from worlds.measured import measured
from worlds.simulated import BASE, MOST, MOST_ONE_SIDED, answers, clusters, one_way, rows, table

from workbench.compare.differences import Difference
from workbench.compare.tables import Table
from workbench.scores.suite import Suite

pytestmark = pytest.mark.nightly
TRIALS = int(os.environ.get("WORKBENCH_TRIALS", "250"))
Scores = tuple[Any, Any]  # of the base and a configuration [2, items], and the items' clusters


def f1(rng: np.random.Generator, cluster: Any, rates: Any) -> Scores:
    """F1 scores: a rare item becomes right, 2 in 5 lose a little; `rates` [items] are those of the gains, 3 % on average."""
    draw, n = rng.random(cluster.size), cluster.size
    gain, loss = draw < rates, draw > 0.6
    change = np.where(gain, rng.uniform(0.6, 1, n), np.where(loss, -0.03 * 0.8 / 0.4 * rng.uniform(0, 2, n), 0.0))
    before = np.where(gain, 0.0, 0.5)
    return np.stack([before, before + change]), cluster


def f1_items(rng: np.random.Generator, k: int, n: int) -> Scores:
    return f1(rng, np.arange(n), np.full(n, 0.03))


def f1_zipf(rng: np.random.Generator, k: int, n: int) -> Scores:
    cluster = clusters("zipf", k, n, rng)
    return f1(rng, cluster, rng.beta(0.03 * 4, 0.97 * 4, k)[cluster])


def few_gain(rng: np.random.Generator, k: int, n: int, share: float = 0.06) -> Scores:
    """Answers: 6 % of the clusters gain 60 % of their items, the others lose as many in all."""
    cluster = np.arange(n) * k // n
    gaining = (rng.random(k) < share)[cluster]
    up, down = rng.random(n) < 0.6, rng.random(n) < 0.6 * share / (1 - share)
    return np.stack([~gaining & down, gaining & up]).astype(float), cluster


def fewer_gain(rng: np.random.Generator, k: int, n: int) -> Scores:
    return few_gain(rng, k, n, 0.03)


def zipf_gain(rng: np.random.Generator, k: int, n: int) -> Scores:
    """Draw as `few_gain` does, in clusters of very unequal size: a large one may gain."""
    cluster = clusters("zipf", k, n, rng)
    gaining = (rng.random(k) < 0.06)[cluster]
    change = np.where(gaining, rng.uniform(0.3, 0.9, cluster.size), -0.6 * 0.06 / 0.94 * rng.uniform(0, 2, cluster.size))
    before = np.where(gaining, 0.0, 0.5)
    return np.stack([before, before + change]), cluster


def exponential(rng: np.random.Generator, k: int, n: int) -> Scores:
    return np.stack([np.zeros(n), 1 - rng.exponential(size=n)]), np.arange(n)


def log_normal(rng: np.random.Generator, k: int, n: int) -> Scores:
    return np.stack([np.zeros(n), np.exp(0.5) - np.exp(rng.normal(size=n))]), np.arange(n)


def bits(rng: np.random.Generator, k: int, n: int) -> Table:
    """Log-likelihoods of documents of unequal length: the rates' differences are skewed."""
    words = np.ceil(100 * np.exp(0.5 * rng.normal(size=n)))
    rate = 0.15 * (rng.gamma(1.5, 1 / 1.5, n) - 1) * np.sqrt(100 / words) + 0.05 * rng.normal(size=n)
    values = {BASE.digest: -2.0 * words, f"{1:032d}": -(2.0 + rate) * words}
    suite = Suite(suite="s", tasks=("t",))
    return Table("t", "bits_per_byte", suite, "p", [{}] * n, np.arange(n), values, {}, ratio="bits_per_byte", weights=words)


# Draw, clusters, items, and whether the limit is promised: from 60 items and 20 clusters on, counted by their sizes.
SKEWED = [
    (f1_items, 50, 50, False),
    (f1_items, 100, 100, True),
    (f1_items, 200, 200, True),
    (f1_zipf, 20, 300, False),
    (f1_zipf, 50, 750, False),
    (few_gain, 20, 200, True),
    (few_gain, 20, 400, True),
    (few_gain, 50, 500, True),
    (fewer_gain, 50, 500, True),
    (fewer_gain, 100, 500, True),
    (zipf_gain, 50, 750, False),
    (bits, 20, 20, False),
    (bits, 60, 60, True),
    (exponential, 20, 20, False),
    (exponential, 60, 60, True),
    (log_normal, 20, 20, False),
    (log_normal, 60, 60, True),
]


def name_of(draw: Any) -> str:
    return str(draw.__name__).replace("_", " ")


@pytest.mark.parametrize(("draw", "k", "n", "promised"), SKEWED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_skewed_differences_of_0(draw: Any, k: int, n: int, promised: bool) -> None:
    """No difference on average, and differences that are not symmetric: better and worse at 5 %."""
    rng, found = np.random.default_rng(n), np.zeros(2)
    for _ in range(TRIALS):
        drawn = draw(rng, k, n)
        made = drawn if isinstance(drawn, Table) else table(*drawn, margin=0.02)
        (row,) = rows(made)
        flipped = made.paired(BASE.digest, f"{1:032d}").changes.flipped
        found += row.verdict in ("better", "worse"), flipped <= 0.05
    ours, flips = found / TRIALS
    case = {"kind": name_of(draw), "clusters": k, "items": n, "level": 0.05, "promised": promised}
    measured("skew, sign flips alone", flips, **case)
    assert measured("skew", ours, **case) <= (MOST + (MOST * (1 - MOST) / TRIALS) ** 0.5 if promised else 1)


@pytest.mark.parametrize(
    ("shape", "k", "n", "gain"),
    [
        ("equal", 240, 240, 0.25),
        ("equal", 50, 500, 0.2),
        ("equal", 24, 240, 0.3),
        ("equal", 20, 400, 0.23),
        ("zipf", 20, 600, 0.27),
    ],
)
def test_symmetric_differences_keep_their_power(shape: str, k: int, n: int, gain: float) -> None:
    rng, found = np.random.default_rng(k), np.zeros(2)
    for _ in range(TRIALS):
        cluster = clusters(shape, k, n, rng)
        made = table(answers(rng, cluster, gain=gain, by_cluster=0.2 if k < n else 0.0), cluster, margin=0.02)
        (row,) = rows(made)
        found += row.verdict == "better", made.paired(BASE.digest, f"{1:032d}").changes.flipped <= 0.05
    ours, flips = found / TRIALS
    case = {"kind": "two-way", "shape": shape, "clusters": k, "items": n, "level": 0.05}
    measured("skew, power of sign flips alone", flips, **case)
    assert measured("skew, power", ours, **case) >= flips - 0.1 or shape == "zipf"


def beta(rng: np.random.Generator, k: int, n: int) -> Scores:
    """Probabilities: most move little, few rise much."""
    return np.stack([np.full(n, 0.3), 0.3 + 0.6 * (rng.beta(0.3, 3, n) - 1 / 11)]), np.arange(n)


def pareto(rng: np.random.Generator, k: int, n: int) -> Scores:
    """Scores without a range: a heavy tail to one side."""
    return np.stack([np.zeros(n), 0.5 - rng.pareto(3, n)]), np.arange(n)


def chapters(rng: np.random.Generator, k: int, n: int) -> Scores:
    """A tenth of the clusters gain .4 to .8 on every item, the others lose a little."""
    cluster = np.arange(n) * k // n
    gaining = (rng.random(k) < 0.1)[cluster]
    change = np.where(gaining, rng.uniform(0.4, 0.8, n), -0.6 / 9 * rng.uniform(0, 2, n))
    before = np.where(gaining, 0.1, 0.5)
    return np.stack([before, before + change]), cluster


# Draws and sizes of one task each; a family has `tasks` times these, or `configurations` on one task.
FAMILIES = [
    *(
        (((draw, k, n),), tasks, configurations)
        for draw, k, n in ((f1_items, 100, 100), (few_gain, 50, 500), (log_normal, 60, 60), (bits, 60, 60))
        for tasks, configurations in ((4, 1), (12, 1), (1, 12))
    ),
    *(
        (((draw, k, n),), tasks, configurations)
        for draw, k, n in ((beta, 120, 120), (pareto, 80, 80), (chapters, 30, 240))
        for tasks, configurations in ((1, 1), (2, 1), (3, 1), (12, 1), (1, 12), (4, 5))
    ),
    (((f1_items, 60, 60), (f1_items, 400, 400), (beta, 120, 120), (chapters, 30, 240)), 1, 1),
    (((f1_items, 200, 200), (chapters, 50, 500), (log_normal, 60, 60), (few_gain, 40, 400), (bits, 80, 80)), 1, 1),
]


def task_of(draw: Any, k: int, n: int, rng: np.random.Generator, configurations: int, name: str) -> Table:
    """One task of a family; the changes of several configurations are added to one baseline, at half their size."""
    drawn = [draw(rng, k, n) for _ in range(configurations)]
    if isinstance(drawn[0], Table):
        words = drawn[0].weights
        assert words is not None
        rates = [made.values[f"{1:032d}"] / made.weights for made in drawn]
        values = {BASE.digest: -2.0 * words, **{f"{i:032d}": rate * words for i, rate in enumerate(rates, 1)}}
        return replace(drawn[0], name=name, suite=Suite(suite="s", tasks=(name,)), values=values)
    ranged = draw not in (log_normal, pareto)
    if configurations == 1:
        values = drawn[0][0]
    else:
        base = 0.5 if ranged else 0.0
        values = np.stack([np.full(n, base), *(base + (after - before) / 2 for (before, after), _ in drawn)])
    made = table(values, drawn[0][1], margin=0.02, task=name)
    return made if ranged else replace(made, metric="nats")


@pytest.mark.parametrize(("shapes", "tasks", "configurations"), FAMILIES)
def test_families_of_skewed_rows(shapes: Any, tasks: int, configurations: int) -> None:
    """No difference on average in any row: any better or worse at 5 %."""
    trials = max(TRIALS // (tasks * configurations) ** 0.5, 40)
    rng, found = np.random.default_rng(tasks + 100 * configurations), np.zeros(2)
    for _ in range(int(trials)):
        tables = [
            task_of(*shape, rng, configurations, f"t{i}")
            for i, shape in enumerate(shape for shape in shapes for _ in range(tasks))
        ]
        judged = rows(*tables)
        flipped = any(row.verdict in ("better", "worse") or (row.reason or "").endswith("reverse the result") for row in judged)
        found += any(row.verdict in ("better", "worse") for row in judged), flipped
    ours, flips = found / int(trials)
    kinds = ", ".join(name_of(draw) for draw, *_ in shapes)
    case = {"kind": kinds, "level": 0.05, "tasks": tasks * len(shapes), "configurations": configurations}
    measured("family, skew, sign flips alone", flips, **case)
    single = tasks * configurations * len(shapes) == 1  # what a single row cannot know is in the table of single rows
    assert single or measured("family, skew", ours, **case) <= MOST + 2 * (MOST * (1 - MOST) / int(trials)) ** 0.5
    if single:
        measured("family, skew", ours, **case)


STEPS = [
    ("every item rises by .02 ± .03", 100, 100, lambda rng, n: 0.02 + 0.03 * rng.normal(size=n)),
    ("every item rises by .02 ± .03", 30, 300, lambda rng, n: 0.02 + 0.03 * rng.normal(size=n)),
    ("every item rises by .02 ± .03", 20, 1000, lambda rng, n: 0.02 + 0.03 * rng.normal(size=n)),
    ("a tenth of the items rises by .2", 100, 100, lambda rng, n: 0.2 * (rng.random(n) < 0.1)),
    ("ROUGE, .02 ± .12", 300, 300, lambda rng, n: 0.02 + 0.12 * rng.standard_t(5, n) * 0.6**0.5),
    ("ROUGE, .04 ± .12", 80, 80, lambda rng, n: 0.04 + 0.12 * rng.standard_t(5, n) * 0.6**0.5),
]


@pytest.mark.parametrize(("kind", "k", "n", "draw"), STEPS)
@pytest.mark.parametrize("tasks", [1, 12])
def test_scores_that_move_in_small_steps_keep_their_power(kind: str, k: int, n: int, draw: Any, tasks: int) -> None:
    """Beside it the sign flips alone, which have the power of a paired t test."""
    trials = max(TRIALS // tasks, 20)
    rng, found = np.random.default_rng(n + tasks), np.zeros(2)
    cluster = np.arange(n) * k // n
    for _ in range(trials):
        base = np.full(n, 0.5)
        tables = [
            table(np.stack([base, (base + draw(rng, n)).clip(0, 1)]), cluster, margin=0.001, task=f"t{i}") for i in range(tasks)
        ]
        judged = rows(*tables)
        withheld = [(row.reason or "").endswith("reverse the result") for row in judged]
        better = [row.verdict == "better" for row in judged]
        found += np.mean(better), np.mean(better) + np.mean(withheld)
    ours, flips = found / trials
    case = {"kind": kind, "clusters": k, "items": n, "level": 0.05, "tasks": tasks}
    measured("small steps, power of sign flips alone", flips, **case)
    assert measured("small steps, power", ours, **case) >= (0.85 if tasks > 1 or k > 20 else 0) * flips


def rarely(rng: np.random.Generator, cluster: Any, loss: float, configurations: int = 1) -> Any:
    """Answers that are all right before; a share of the clusters loses all of them."""
    k = int(cluster.max()) + 1
    after = (rng.random((configurations, k)) >= loss).astype(float)[:, cluster]
    return np.concatenate([np.ones((1, cluster.size)), after])


def by_interval(row: Difference, bound: float) -> bool:
    """True if the adjusted interval alone excludes a loss as large as a bound; (0, 0) does if no item changed."""
    return -bound < row.low_adj


HARM = [
    *((one_way, n, n, 0.02, 1) for n in (10, 30, 100, 400)),
    *((one_way, n, n, 0.05, 10) for n in (30, 100, 400)),
    *((rarely, k, 10 * k, 0.05, 1) for k in (20, 50, 200)),
]


@pytest.mark.parametrize(
    ("draw", "k", "n", "loss", "configurations"), HARM, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_harm_that_few_items_show(draw: Any, k: int, n: int, loss: float, configurations: int) -> None:
    """All configurations lose as much as the tolerance: any "safe", and any "equivalent" on a task that is not guarded, at 2.5 %."""
    rng, cluster, found = np.random.default_rng(n), np.arange(n) * k // n, np.zeros(3)
    for _ in range(TRIALS):
        values = draw(rng, cluster, loss, configurations)
        guarded = rows(table(values, cluster, margin=loss, guarded=True))
        free = rows(table(values, cluster, margin=loss))
        verdicts = [[row.verdict for row in part] for part in (guarded, free)]
        found += "safe" in verdicts[0], "equivalent" in verdicts[1], any(by_interval(row, loss) for row in guarded)
    safe, equivalent, alone = found / TRIALS
    kind = "losses of items" if draw is one_way else "clusters that lose all"
    case = {"kind": kind, "clusters": k, "items": n, "level": 0.025, "configurations": configurations, "loss": loss}
    measured("harm, safe by the interval alone", alone, **case)
    assert measured("harm, safe", safe, **case) <= MOST_ONE_SIDED
    assert measured("harm, equivalent", equivalent, **case) <= MOST_ONE_SIDED


@pytest.mark.parametrize(
    ("k", "n", "drawn"), [(200, 200, "clusters"), (400, 400, "clusters"), (50, 500, "clusters"), (50, 500, "items")]
)
def test_what_is_safe_is_found(k: int, n: int, drawn: str) -> None:
    """The tolerance is 2 points; no item changes, or half a point is lost. Clusters of ten are too few unless their items were drawn."""
    rng, cluster, found = np.random.default_rng(n), np.arange(n) * k // n, np.zeros(2)
    for _ in range(TRIALS):
        lost = one_way(rng, np.arange(n), 0.005)
        found += [
            rows(table(values, cluster, margin=0.02, guarded=True, drawn=drawn))[0].verdict == "safe"
            for values in (np.ones((2, n)), lost)
        ]
    nothing, little = found / TRIALS
    case = {"clusters": k, "items": n, "level": 0.025, "drawn": drawn}
    assert measured("safe, nothing lost", nothing, kind="nothing", **case) == (k >= 183 or drawn == "items")
    measured("safe, half a point lost", little, kind="little", **case)
