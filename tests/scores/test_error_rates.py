"""How often verdicts err: false verdicts, coverage and power over simulated evaluations, seeded.

The functions that the comparison uses are run, not copies of them. `python benchmarks/error_rates.py` runs this file with more trials, keeps
what it measures, and docs/evaluation-errors.md shows that as a table.

At a rate of 5 % the standard error of 1,000 trials is 0.7 points, of 4,000 0.35. Every run draws the same trials.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from worlds.measured import measured
from worlds.simulated import MOST, MOST_ONE_SIDED, answers, clusters, draw, one_way, rows, share, table

from workbench.scores.paired import Paired, paired, paired_ratio
from workbench.scores.statistics import ratio, ratio_interval, score_interval

pytestmark = pytest.mark.nightly
TRIALS = int(os.environ.get("WORKBENCH_TRIALS", "1000"))
FEWER = int(os.environ.get("WORKBENCH_TRIALS", "500"))  # of what takes ten times as long a trial
MANY = max(4000, TRIALS)  # for coverage of corpus metrics, whose limits are one point to either side of 95 %
COVERED = (0.94, 0.96)
LEAST = COVERED[0] - (0.05 * 0.95 / TRIALS) ** 0.5  # one standard error of the simulation below
SHAPES = ("equal", "lognormal", "zipf", "half")
SIZES = ((12, 240), (24, 240), (50, 500))  # clusters, items
LOSS = 0.05


def cases(*kinds: str) -> list[tuple[str, str, int, int]]:
    """Return cases (kind, shape, clusters, items) that cover every pair of two values; all cases where WORKBENCH_TRIALS is set."""
    every = "WORKBENCH_TRIALS" in os.environ
    table = product(enumerate(SHAPES), enumerate(kinds), enumerate(SIZES))
    chosen = [(kind, shape, *size) for (i, shape), (j, kind), (k, size) in table if every or k == (i + j) % len(SIZES)]
    return chosen + [(kind, "equal", 240, 240) for kind in kinds]


@pytest.mark.parametrize(("kind", "shape", "k", "n"), cases("two-way", "sparse", "continuous"))
def test_no_difference(kind: str, shape: str, k: int, n: int) -> None:
    """Effects vary by cluster and are 0 on average: better and worse at 5 %, coverage of the 95 % interval."""
    rng, wrong, covered = np.random.default_rng(k), 0, 0
    for _ in range(TRIALS):
        cluster = clusters(shape, k, n, rng)
        (row,) = rows(table(draw(kind, rng, cluster, 0.0)[0], cluster, margin=LOSS))
        wrong += row.verdict in ("better", "worse")
        covered += row.low <= 0 <= row.high
    case = {"kind": kind, "shape": shape, "clusters": k, "items": n, "level": 0.05}
    assert measured("better or worse", wrong / TRIALS, **case) <= MOST
    assert measured("coverage", covered / TRIALS, **case) >= LEAST


@pytest.mark.parametrize(("kind", "shape", "k", "n"), cases("two-way", "sparse", "one-way", "continuous"))
def test_a_loss_as_large_as_the_margin(kind: str, shape: str, k: int, n: int) -> None:
    """The true loss is the margin: "equivalent" and "safe" at 2.5 %, coverage of the 95 % interval."""
    rng, found = np.random.default_rng(k), np.zeros(3)
    for _ in range(TRIALS):
        cluster = clusters(shape, k, n, rng)
        values, loss = draw(kind, rng, cluster, LOSS)
        pair = table(values, cluster, margin=loss), table(values, cluster, margin=loss, task="u", guarded=True)
        free, guarded = rows(*pair)
        found += free.verdict == "equivalent", guarded.verdict == "safe", free.low <= -loss <= free.high
    equivalent, safe, covered = found / TRIALS
    case = {"kind": kind, "shape": shape, "clusters": k, "items": n, "level": 0.025}
    assert measured("equivalent", equivalent, **case) <= MOST_ONE_SIDED
    assert measured("safe", safe, **case) <= MOST_ONE_SIDED
    assert measured("coverage", covered, **case) >= LEAST


@pytest.mark.parametrize(("loss", "n"), [(0.02, 240), (0.02, 1000)])
def test_few_losses(loss: float, n: int) -> None:
    """A true loss of two points of independent items: a handful of losses and no win."""
    rng, cluster = np.random.default_rng(n), np.arange(n)
    pairs = (rows(table(one_way(rng, cluster, loss), cluster, margin=loss, guarded=True))[0] for _ in range(FEWER))
    safe = share(row.verdict in ("safe", "no item changed") for row in pairs)
    assert measured("safe", safe, kind="one-way, few", shape="equal", clusters=n, items=n, level=0.025) <= MOST_ONE_SIDED


@pytest.mark.parametrize(("configurations", "k", "n"), [(20, 30, 150), (64, 10, 150), (20, 240, 240)])
def test_family_without_a_difference(configurations: int, k: int, n: int) -> None:
    """Any better or worse among configurations on the same items."""
    rng, cluster = np.random.default_rng(2), clusters("equal", k, n, np.random.default_rng(0))
    wrong = share(
        any(
            row.verdict in ("better", "worse")
            for row in rows(table(answers(rng, cluster, configurations, by_cluster=0.3), cluster, margin=LOSS))
        )
        for _ in range(TRIALS)
    )
    case = {"kind": "two-way", "shape": "equal", "clusters": k, "items": n, "level": 0.05, "configurations": configurations}
    assert measured("any better or worse", wrong, **case) <= MOST


def test_family_over_tasks_of_unequal_clusters() -> None:
    """Seven configurations on five tasks, clusters log-normal; three configurations are truly better on one task: the rest stays quiet."""
    rng, wrong, found, by_holm = np.random.default_rng(5), 0, 0, 0
    for _ in range(FEWER):
        tables = []
        for task in range(5):
            cluster = clusters("lognormal", 24, 240, rng)
            values = answers(rng, cluster, 7, by_cluster=0.3)
            if task == 0:
                values[1:4] = np.maximum(values[1:4], rng.random((3, cluster.size)) < 0.5)
            tables.append(table(values, cluster, margin=LOSS, task=f"t{task}"))
        made = rows(*tables)
        verdicts = {(row.configuration, row.task): row.verdict in ("better", "worse") for row in made}
        true = [(f"c{c}", "t0") for c in (1, 2, 3)]
        found += sum(verdicts[cell] for cell in true)
        by_holm += sum(row.p * len(verdicts) <= 0.05 for row in made if (row.configuration, row.task) in true)
        wrong += any(said for cell, said in verdicts.items() if cell not in true)
    case = {"kind": "two-way", "shape": "lognormal", "clusters": 24, "items": 240, "level": 0.05, "configurations": 7, "tasks": 5}
    assert measured("any false better or worse", wrong / FEWER, **case) <= MOST
    # Holm's correction of sign-flip p values finds more here: where clusters are unequal, statistics of two rows are not alike.
    measured("power, Holm", by_holm / FEWER / 3, **case)
    assert measured("power", found / FEWER / 3, **case) >= 0.5


@pytest.mark.parametrize("kind", ["one-way", "two-way"])
@pytest.mark.parametrize("configurations", [11, 20])
def test_family_at_the_margin(kind: str, configurations: int) -> None:
    """All configurations lose as much as the margin: any "equivalent", any "safe"."""
    rng, cluster, found = np.random.default_rng(configurations), np.arange(240) // 10, np.zeros(2)
    gain = stats.norm.ppf(0.5 - LOSS) * np.sqrt(1 + 0.7**2 + 0.6**2 + 0.3**2)
    for _ in range(FEWER):
        if kind == "one-way":
            values = one_way(rng, cluster, LOSS, configurations)
        else:
            values = answers(rng, cluster, configurations, gain=gain, by_cluster=0.3)
        both = table(values, cluster, margin=LOSS), table(values, cluster, margin=LOSS, task="u", guarded=True)
        verdicts = [row.verdict for row in rows(*both)]
        found += "equivalent" in verdicts, "safe" in verdicts
    equivalent, safe = found / FEWER
    case = {"kind": kind, "shape": "equal", "clusters": 24, "items": 240, "level": 0.025, "configurations": configurations}
    assert measured("any equivalent", equivalent, **case) <= MOST_ONE_SIDED
    assert measured("any safe", safe, **case) <= MOST_ONE_SIDED


def t_test(pair: Paired) -> float:
    """p of the cluster-robust t test with k-1 degrees of freedom, which is honest for equal clusters."""
    return float(2 * stats.t.sf(abs(pair.diff) / pair.se, pair.clusters - 1)) if pair.se > 0 else 1.0


@pytest.mark.parametrize(("k", "n", "gain"), [(24, 240, 0.3), (50, 500, 0.2), (240, 240, 0.25), (1000, 1000, 0.12)])
def test_power_is_that_of_the_t_test_for_equal_clusters(k: int, n: int, gain: float) -> None:
    rng, cluster, found = np.random.default_rng(k), np.arange(n) // (n // k), np.zeros(2)
    for _ in range(TRIALS):
        pair = paired(*answers(rng, cluster, gain=gain, by_cluster=0.2 if k < n else 0.0), cluster.tolist())
        found += pair.p <= 0.05, t_test(pair) <= 0.05
    ours, theirs = found / TRIALS
    case = {"kind": "two-way", "shape": "equal", "clusters": k, "items": n, "level": 0.05}
    measured("power, t test", theirs, **case)
    assert measured("power", ours, **case) >= theirs - 0.02


@pytest.mark.parametrize(("configurations", "k", "n", "won"), [(20, 24, 240, 0.3), (64, 10, 200, 0.8)])
def test_power_in_a_family_is_above_holms(configurations: int, k: int, n: int, won: float) -> None:
    """One configuration of the family is better: Holm's correction of the single p values pays for every other one."""
    rng, cluster, found = np.random.default_rng(7), np.arange(n) // (n // k), np.zeros(2)
    for _ in range(TRIALS // 4):
        values = answers(rng, cluster, configurations, by_cluster=0.2)
        values[1] = np.maximum(values[1], rng.random(n) < won)
        found_rows = rows(table(values, cluster, margin=LOSS))
        found += found_rows[0].verdict == "better", found_rows[0].p * configurations <= 0.05
    ours, theirs = found / (TRIALS // 4)
    case = {"kind": "two-way", "shape": "equal", "clusters": k, "items": n, "level": 0.05, "configurations": configurations}
    measured("power, Holm", theirs, **case)
    assert measured("power", ours, **case) >= theirs
    assert ours >= 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("k", "n"), [(12, 240), (50, 500)])
def test_coverage_of_one_score(shape: str, k: int, n: int) -> None:
    rng, covered = np.random.default_rng(k), 0
    for _ in range(TRIALS):
        cluster = clusters(shape, k, n, rng)
        low, high = score_interval(answers(rng, cluster)[0], cluster)
        covered += low <= 0.5 <= high
    case = {"kind": "one score", "shape": shape, "clusters": k, "items": n, "level": 0.05}
    assert measured("coverage", covered / TRIALS, **case) >= LEAST


NEAR_ONE = list(product((0.9, 0.97, 0.99), (10, 20, 50), (5, 10, 30), (0.0, 0.3, 0.7)))
HARD = [
    (0.97, 20, 10, 0.7),
    (0.97, 50, 10, 0.7),
    (0.97, 50, 30, 0.7),
    (0.99, 20, 30, 0.7),
    (0.99, 50, 30, 0.3),
    (0.9, 20, 10, 0.0),
]


@pytest.mark.parametrize(("truth", "k", "size", "alike"), NEAR_ONE if "WORKBENCH_TRIALS" in os.environ else HARD)
def test_coverage_of_one_score_near_one(truth: float, k: int, size: int, alike: float) -> None:
    """Items of a cluster are right together (beta-binomial of correlation `alike`), so that few clusters show that any item is wrong."""
    rng, cluster, covered = np.random.default_rng(k), np.arange(k * size) // size, 0
    for _ in range(TRIALS):
        spread = (1 - alike) / alike if alike else 0
        rates = rng.beta(truth * spread, (1 - truth) * spread, k) if alike else np.full(k, truth)
        low, high = score_interval((rng.random(cluster.size) < rates[cluster]).astype(float), cluster)
        covered += low <= truth <= high
    case = {
        "kind": "near one",
        "shape": "equal",
        "clusters": k,
        "items": k * size,
        "level": 0.05,
        "score": truth,
        "correlation": alike,
    }
    assert measured("coverage", covered / TRIALS, **case) >= 0.92


@pytest.mark.parametrize("clusters", [8, 12, 20, 50])
def test_coverage_of_margins(clusters: int) -> None:
    """Scores without ties, such as margins in nats: true difference 0.1."""
    rng, cluster = np.random.default_rng(clusters), np.arange(clusters * 6) // 6
    covered = 0
    for _ in range(MANY // 2):
        before = rng.normal(size=cluster.size)
        after = before + 0.1 + 0.2 * rng.normal(size=clusters)[cluster] + 0.5 * rng.normal(size=cluster.size)
        low, high = paired(before, after, cluster.tolist()).interval()
        covered += low <= 0.1 <= high
    assert COVERED[0] <= 2 * covered / MANY <= COVERED[1]


def losses(rng: np.random.Generator, cluster: Any, spread: float, gap: float) -> tuple[Any, Any, Any]:
    """Log-likelihoods of documents under two models and their weights: 2 nats a word, clusters and documents differ, short documents
    more; weights are log-normal with this spread, rates are skewed."""
    n, k = cluster.size, int(cluster.max()) + 1
    words = np.ceil(100 * np.exp(spread * rng.normal(size=n)))
    skewed = (rng.gamma(1.5, 1 / 1.5, (2, n)) - 1) * np.sqrt(100 / words)
    base = 2.0 + 0.3 * rng.normal(size=k)[cluster] + 0.5 * skewed[0]
    other = base + gap + 0.05 * rng.normal(size=k)[cluster] + 0.15 * skewed[1]
    return -base * words, -other * words, words


@pytest.mark.parametrize(
    ("clusters", "each", "spread", "gap"),
    [(12, 4, 0.5, 0.05), (20, 3, 0.5, 0.0), (20, 3, 1.0, 0.4), (50, 2, 1.0, 0.05), (200, 1, 1.0, 0.4)],
)
def test_coverage_of_corpus_metrics(clusters: int, each: int, spread: float, gap: float) -> None:
    rng, cluster = np.random.default_rng(clusters), np.arange(clusters * each) // each
    kind, one = "weighted_perplexity", np.exp(2.0)
    both, single = 0, 0
    for _ in range(MANY):
        a, b, words = losses(rng, cluster, spread, gap)
        low, high = paired_ratio(kind, a, b, words, cluster.tolist()).interval(0.05)
        both += low <= np.exp(2.0 + gap) - one <= high
        low, high = ratio_interval(kind, a, words, cluster)
        single += low <= one <= high
    assert COVERED[0] <= both / MANY <= COVERED[1]
    assert COVERED[0] <= single / MANY <= COVERED[1]


def test_percentile_bootstrap_covers_less() -> None:
    """Why corpus metrics do not get one: 20 clusters of unequal weight, 1,000 draws (91.7 % of 20,000 trials)."""
    rng, cluster = np.random.default_rng(3), np.arange(60) // 3
    kind, covered = "bits_per_byte", np.zeros(2)
    truth = ratio(kind, [-2.0], [1.0])
    for _ in range(TRIALS):
        a, _, words = losses(rng, cluster, 1.0, 0.0)
        sums, sizes = np.bincount(cluster, -a), np.bincount(cluster, words)
        draws = rng.multinomial(20, np.full(20, 1 / 20), 1000)
        low, high = np.percentile((draws @ sums) / (draws @ sizes) / np.log(2), (2.5, 97.5))
        ours = ratio_interval(kind, a, words, cluster)
        covered += (low <= truth <= high, ours[0] <= truth <= ours[1])
    bootstrap, jackknife = covered / TRIALS
    assert bootstrap <= jackknife - 0.02
