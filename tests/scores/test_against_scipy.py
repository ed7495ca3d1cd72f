"""Statistics against scipy, statsmodels, scikit-learn and sacrebleu on samples that hypothesis draws: ties, constants, one or two items, one
cluster, unequal clusters. Where ours differ by design, both values are asserted."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import sacrebleu
import statsmodels.api as sm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lm_eval.api import metrics as lm_metrics
from scipy import stats
from sklearn.metrics import brier_score_loss, f1_score, matthews_corrcoef
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from workbench.evaluate.gold import corpus_contributions
from workbench.scores.paired import paired, paired_ratio
from workbench.scores.signflips import step_down, t_tail, tails
from workbench.scores.statistics import (
    UndefinedError,
    brier_score,
    clustered_rates,
    clustered_se,
    expanded_tail,
    interval,
    resampled_means,
    score_interval,
    upper_t,
)

CLOSE = {"rel": 1e-9, "abs": 1e-11}
quick = settings(max_examples=60, deadline=None, derandomize=True)
values_of = {
    "answers": st.sampled_from([0.0, 1.0]),
    "shares": st.integers(0, 8).map(lambda i: i / 8),
    "numbers": st.floats(-50, 50, width=32),
    "constant": st.just(0.25),
}


@st.composite
def samples(draw: Any, rows: int = 1, least: int = 1, most: int = 9, equal: bool = False) -> tuple[str, Any, Any]:
    """Kind of score, scores [rows, items], cluster of each item."""
    clusters = draw(st.integers(least, most))
    sizes = draw(st.lists(st.integers(1, 4), min_size=clusters, max_size=clusters))
    cluster = np.repeat(np.arange(clusters), sizes[:1] * clusters if equal else sizes)
    kind = draw(st.sampled_from(sorted(values_of)))
    line = st.lists(values_of[kind], min_size=len(cluster), max_size=len(cluster))
    return kind, np.array([draw(line) for _ in range(rows)]), cluster


def least_squares(values: Any, cluster: Any, weights: Any = None) -> Any:
    """The mean as a regression on 1, with clustered errors."""
    model = sm.OLS(values, np.ones(len(values))) if weights is None else sm.WLS(values, np.ones(len(values)), weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statsmodels, about errors of 0
        return model.fit(cov_type="cluster", cov_kwds={"groups": cluster}, use_t=True)


def cr2(values: Any, cluster: Any) -> float:
    """Bell and McCaffrey's estimator in its own terms: residuals times (1 - hat matrix of the cluster) ^ -1/2."""
    total = 0.0
    for c in np.unique(cluster):
        inside = cluster == c
        size = int(inside.sum())
        roots, vectors = np.linalg.eigh(np.eye(size) - np.ones((size, size)) / len(values))
        total += float((vectors @ np.diag(roots**-0.5) @ vectors.T @ (values[inside] - values.mean())).sum()) ** 2
    return math.sqrt(total) / len(values)


@given(samples(least=2), samples(least=2, equal=True))
@quick
def test_clustered_errors(unequal: Any, equal: Any) -> None:
    """Equal clusters: statsmodels' error. Unequal ones: CR2, where statsmodels has CR1, which is smaller if a large cluster deviates."""
    _, (values,), cluster = equal
    assert clustered_se(values, cluster) == pytest.approx(float(least_squares(values, cluster).bse[0]), **CLOSE)
    if cluster[-1] == len(cluster) - 1:
        assert clustered_se(values, cluster) == pytest.approx(stats.sem(values), **CLOSE)
    _, (values,), cluster = unequal
    assert clustered_se(values, cluster) == pytest.approx(cr2(values, cluster), **CLOSE)
    sizes = np.bincount(cluster)
    deviations, k = np.bincount(cluster, values) - sizes * values.mean(), len(sizes)
    cr1 = math.sqrt(k / (k - 1) * (deviations**2).sum()) / len(values)
    assert float(least_squares(values, cluster).bse[0]) == pytest.approx(cr1, **CLOSE)


@given(samples(least=1, equal=True))
@quick
def test_intervals_of_a_score(sample: Any) -> None:
    """Student's t for scores; for answers Wilson's with its quantile on n / design effect answers, or fewer: a correlation may be hidden."""
    _, (values,), cluster = sample
    k, n, mean = int(cluster[-1]) + 1, len(values), float(values.mean())
    inside, (low, high) = values.min() >= 0 and values.max() <= 1, score_interval(values, cluster)
    if k == 1:
        assert (low, high) == ((0, 1) if inside else (-math.inf, math.inf))
        return
    if not np.isin(values, (0.0, 1.0)).all():
        theirs = least_squares(values, cluster).conf_int()[0]
        assert (low, high) == pytest.approx(np.clip(theirs, 0, 1) if inside else theirs, rel=1e-7, abs=1e-9)
        return
    assert low <= mean <= high
    plain = proportion_confint(values.sum(), n, method="wilson")
    assert low <= plain[0] + 1e-12
    assert high >= plain[1] - 1e-12
    seen = float(least_squares(values, cluster).bse[0]) ** 2 * n / (mean * (1 - mean)) if 0 < mean < 1 else 1.0
    counted, level = n / max(seen, 1.0), 2 * float(stats.norm.sf(stats.t.isf(0.025, k - 1)))
    ends = proportion_confint(mean * counted, counted, level, "wilson")
    assert (low, high) == pytest.approx(ends, rel=1e-7, abs=1e-9) or (k < n and low < ends[0] + 1e-9 and high > ends[1] - 1e-9)


@given(samples(rows=2, most=7))
@quick
def test_sign_flips(sample: Any) -> None:
    """scipy's exact test counts what was seen whole, ours half: mid-p. For answers that is McNemar's exact test less half a tie."""
    kind, (a, b), cluster = sample
    sums = np.bincount(cluster, b - a)
    pair = paired(a, b, cluster.tolist())
    assert pair.p >= pair.changes.flipped  # the rest of p is for skewness, which scipy's test assumes away
    if not np.abs(sums).max():
        assert pair.changes.flipped == 1
        return
    if len(sums) > 1:
        found = stats.permutation_test((sums,), lambda x, axis: x.sum(axis), permutation_type="samples", vectorized=True)
        seen, drawn, close = abs(sums.sum()), np.abs(found.null_distribution), 1e-5 * np.abs(sums).sum()
        tied = float((np.abs(drawn - seen) <= close).mean())
        assert pair.changes.flipped == pytest.approx((drawn > seen + close).mean() + tied / 2, **CLOSE)
        assert found.pvalue == pytest.approx((drawn >= seen - close).mean(), abs=1e-9) or kind == "numbers"
    alone = paired(a, b)
    if kind == "answers" and alone.wins + alone.losses <= 12 and len(a) <= 14:
        up, down = alone.wins, alone.losses
        table = [[0, up], [down, 0]]
        tie = float(stats.binom.pmf(up, up + down, 0.5))
        assert mcnemar(table, exact=True).pvalue == pytest.approx(stats.binomtest(up, up + down).pvalue)
        whole = mcnemar(table, exact=True).pvalue if up != down else 1.0
        assert alone.changes.flipped == pytest.approx(whole - (tie if up != down else tie / 2))


@given(samples(rows=2, least=1))
@quick
def test_a_difference_has_two_sides_and_no_order(sample: Any) -> None:
    """From the other side, with items in another order and under other labels, every number is the same; the interval is that of the test."""
    _, (a, b), cluster = sample
    pair, back = paired(a, b, cluster.tolist()), paired(b, a, cluster.tolist())
    order = np.random.default_rng(len(a)).permutation(len(a))
    moved = paired(a[order], b[order], [f"c{c}" for c in cluster[order]])
    assert (pair.n, pair.clusters, pair.diff) == (len(a), cluster[-1] + 1, pytest.approx(b.mean() - a.mean(), abs=1e-12))
    for level in (0.05, 0.01):
        low, high = pair.interval(level)
        assert low <= pair.diff + 1e-9
        assert high >= pair.diff - 1e-9
        assert (pair.p <= level) == (low > 0 or high < 0)
        for other, ends in ((back, (-high, -low)), (moved, (low, high))):
            assert other.interval(level) == pytest.approx(ends, rel=1e-6, abs=1e-8)
    for other in (back, moved):
        assert (other.p, other.se) == pytest.approx((pair.p, pair.se), rel=1e-6, abs=1e-9)
    assert 0 < pair.p <= 1
    assert (moved.wins, moved.losses) == (pair.wins, pair.losses) == (back.losses, back.wins)


@given(samples(rows=2, least=3, equal=True))
@quick
def test_intervals_of_a_difference(sample: Any) -> None:
    """Equal clusters and no range: statsmodels' interval, moved only to say what the sign flips say."""
    _, (a, b), cluster = sample
    pair = paired(a, b, cluster.tolist(), span=math.inf)
    if pair.unchanged:
        assert pair.interval() == (0, 0)
        return
    fit = least_squares(b - a, cluster)
    (low, high), ours = fit.conf_int()[0], pair.interval()
    rejected = pair.p <= 0.05
    assert ours[0] == pytest.approx(
        max(low, 0) if rejected and pair.diff > 0 else low if rejected else min(low, 0), rel=1e-6, abs=1e-7
    )
    assert ours[1] == pytest.approx(
        min(high, 0) if rejected and pair.diff < 0 else high if rejected else max(high, 0), rel=1e-6, abs=1e-7
    )


@given(samples(rows=2, least=2), st.lists(st.integers(1, 9), min_size=36, max_size=36))
@quick
def test_ratios_of_sums(sample: Any, weights: list[int]) -> None:
    """A rate is a weighted mean, its error the jackknife over clusters. Clusters of equal weight: statsmodels' error of a weighted regression."""
    _, values, cluster = sample
    w, k = np.array(weights[: len(cluster)], float), int(cluster[-1]) + 1
    numerators = values * w
    rates, covariance, _ = clustered_rates(-numerators, w, cluster)
    assert rates == pytest.approx(-np.average(values, axis=1, weights=w), **CLOSE)
    left_out = np.array([np.average(values[:, cluster != c], axis=1, weights=w[cluster != c]) for c in range(k)])
    gaps = left_out - np.average(values, axis=1, weights=w)
    assert covariance == pytest.approx((k - 1) / k * gaps.T @ gaps, rel=1e-7, abs=1e-9)
    w /= np.bincount(cluster, w)[cluster]
    rates, covariance, df = clustered_rates(-values * w, w, cluster)
    fit = least_squares(values[0], cluster, w)
    assert (-rates[0], math.sqrt(covariance[0, 0])) == pytest.approx((fit.params[0], fit.bse[0]), rel=1e-7, abs=1e-9)
    pair = paired_ratio("bits_per_byte", *(values * w), w, cluster.tolist())
    fit = least_squares((values[0] - values[1]) / math.log(2), cluster, w)
    assert df == pytest.approx(k - 1)
    if pair.p > 0.05 and not pair.unchanged:
        low, high = fit.conf_int()[0]
        assert pair.interval() == pytest.approx((min(low, 0), max(high, 0)), rel=1e-6, abs=1e-7)


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=8), min_size=1, max_size=4))
@quick
def test_independent_tasks_are_holm_and_sidaks(tasks: list[list[float]]) -> None:
    """One row a task: statsmodels' Holm-Sidak, at most Holm, which does not know that tasks are independent."""
    sums = [np.array(task)[:, None] for task in tasks if any(task)]
    assume(sums)
    alone = [float(tails(s)[0]) for s in sums]
    steps = [step for (step,) in step_down([(s, np.sqrt((s**2).sum(0))) for s in sums], 0.05)]
    rejected, adjusted, *_ = multipletests(alone, 0.05, "holm-sidak")
    found = np.array([step.p for step in steps])
    assert found == pytest.approx(adjusted, rel=1e-7, abs=1e-12)
    assert (found <= 0.05).tolist() == rejected.tolist()
    assert (found <= multipletests(alone, 0.05, "holm")[1] + 1e-9).all()


@pytest.mark.parametrize("n", [20, 60, 200])
def test_power(n: int) -> None:
    """The critical t and the normal quantile of 80 % stand for the noncentral t: 2 % apart with 20 items, .2 % with 200."""
    d = np.random.default_rng(n).normal(0, 2, n)
    pair = paired(np.zeros(n), d)
    exact = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8) * pair.se * math.sqrt(n)
    ours = (stats.t.isf(0.025, n - 1) + stats.norm.isf(0.2)) * pair.se
    assert pair.mde() == pytest.approx(ours)
    assert ours == pytest.approx(exact, rel=0.4 / n)
    effect = pair.mde() or 0.0
    assert pair.needs(effect / 2) == pytest.approx(4 * n, abs=1)
    assert TTestPower().solve_power(effect_size=effect / 2 / pair.se / math.sqrt(n), alpha=0.05, power=0.8) == pytest.approx(
        4 * n, rel=0.15
    )


@pytest.mark.parametrize("df", [0.3, 1, 1.7, 12, 1e6])
def test_quantiles(df: float) -> None:
    """Less than one degree of freedom counts as one, where scipy's quantile has no bound."""
    for tail in (1e-9, 0.025, 0.4, 0.8):
        assert upper_t(tail, df) == pytest.approx(stats.t.isf(tail, max(df, 1)), rel=1e-11)
    assert df >= 1 or upper_t(0.025, df) < stats.t.isf(0.025, df)
    for t in (0.0, 0.01, 1.3, 7.0, 40.0, math.inf):
        assert t_tail(t, max(df, 1)) == pytest.approx(stats.t.sf(t, max(df, 1)), rel=1e-11)
    assert (upper_t(0.0, df), upper_t(0.5, df)) == (math.inf, 0.0)


def test_resampled_clusters_beside_scipys_bootstrap() -> None:
    """The same spread. Of 12 skewed values, ours is as wide as Student's interval; BCa's, which follows the skewness, lies higher."""
    values = np.random.default_rng(1).exponential(size=12)
    drawn = resampled_means(values, np.arange(12), seed=3, reps=20_000)[0]
    theirs = {
        method: stats.bootstrap((values,), np.mean, n_resamples=20_000, method=method, rng=np.random.default_rng(2))
        for method in ("percentile", "BCa")
    }
    assert drawn.std() == pytest.approx(theirs["BCa"].standard_error, rel=0.02)
    assert np.quantile(drawn, (0.025, 0.975)) == pytest.approx(theirs["percentile"].confidence_interval, rel=0.02)
    tail = expanded_tail(0.025, 12)
    assert tail == pytest.approx(stats.norm.cdf(-math.sqrt(12 / 11) * stats.t.isf(0.025, 11)))
    wide = float(np.diff(np.quantile(drawn, (tail, 1 - tail)))[0])
    student = 2 * float(stats.t.isf(0.025, 11) * stats.sem(values))
    assert wide == pytest.approx(student, rel=0.05)
    ours, bca = np.quantile(drawn, (tail, 1 - tail)), theirs["BCa"].confidence_interval
    assert (bca.low > ours[0], bca.high > ours[1]) == (True, True), (ours, bca)


WORDS = st.sampled_from(["the", "cat", "sat", "Straße", "漢字", "don't", "a,b", "!", "é"])
TEXT = st.lists(WORDS, max_size=7).map(" ".join)
SACRE: dict[str, Any] = {
    "bleu": sacrebleu.corpus_bleu,
    "chrf": sacrebleu.corpus_chrf,
    "chrf++": lambda said, wanted: sacrebleu.corpus_chrf(said, wanted, word_order=2),
    "ter": sacrebleu.corpus_ter,
}


@given(st.lists(st.tuples(TEXT, TEXT, st.integers(0, 5)), min_size=1, max_size=12))
@quick
def test_metrics_of_texts_are_sacrebleus(rows: list[tuple[str, str, int]]) -> None:
    """The value, and each cluster's part in it: N - n times the change without the cluster, over n, with the value as their mean."""
    _, cluster = np.unique([c for *_, c in rows], return_inverse=True)
    pairs = [(wanted, said) for wanted, said, _ in rows]
    sizes = np.bincount(cluster)
    for name, corpus in SACRE.items():

        def value(kept: Any, corpus: Any = corpus) -> float:
            some = [p for p, inside in zip(pairs, kept, strict=True) if inside]
            return float(corpus([said for _, said in some], [[wanted for wanted, _ in some]]).score)

        whole = value(cluster >= 0)
        ours = corpus_contributions(name, pairs, cluster)
        assert ours is not None
        assert ours.mean() == pytest.approx(whole, abs=1e-9)
        parts = (
            np.array([(len(rows) - n) * (whole - value(cluster != c)) for c, n in enumerate(sizes)])
            if len(sizes) > 1
            else sizes * 0
        )
        assert np.bincount(cluster, ours) / sizes == pytest.approx(whole + parts / sizes - parts.sum() / len(rows), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=14))
@quick
def test_metrics_of_classes_are_scikit_learns(rows: list[tuple[int, int, int]]) -> None:
    """F1 and MCC; what has no value without one cluster is said to have none. Brier scores of a row are those of three classes."""
    gold, said, labels = (list(column) for column in zip(*rows, strict=True))
    _, cluster = np.unique(labels, return_inverse=True)
    for name, theirs in (("f1", f1_score), ("mcc", matthews_corrcoef)):
        registered = {"mcc": "matthews_corrcoef"}.get(name, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, where a class is missing
            whole = float(theirs(gold, said))
            try:
                ours = corpus_contributions(registered, list(zip(gold, said, strict=True)), cluster)
            except UndefinedError:
                assert not math.isfinite(whole)
                continue
        assert ours is not None
        assert ours.mean() == pytest.approx(whole, abs=1e-9)
        low, high = interval(registered, ours, cluster)
        assert low <= whole + 1e-9
        assert high >= whole - 1e-9
    shares = np.random.default_rng(len(rows)).dirichlet(np.ones(3), len(rows))
    own = [brier_score(right, row) for right, row in zip(gold, shares.tolist(), strict=True)]
    assert np.mean(own) == pytest.approx(brier_score_loss(gold, shares, labels=[0, 1, 2], scale_by_half=False))
    assert np.mean(own) == pytest.approx(lm_metrics.brier_score(list(zip(gold, shares, strict=True))))
