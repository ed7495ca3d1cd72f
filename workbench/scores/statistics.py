"""Statistics of one configuration's scores: clustered standard errors and intervals, and contributions to metrics of a whole corpus.

Items that share a cluster (a template, a passage) are not independent. Standard errors and resampling therefore work on clusters, and
clusters of unequal size count as a smaller effective number. Sources: Miller 2024, arXiv 2411.00640 (clustered errors of evaluations); Bell and McCaffrey 2002
(CR2); Wilson 1927; Efron 1982 (delete-one jackknife of ratios); Hesterberg 2015 (expanded percentiles).

lm-eval computes a metric of a whole corpus (F1, MCC, BLEU, a task's own aggregation) by one function of all items. Let it be t on N items, and
t(c) without cluster c of n items. Each item of c contributes t + (N - n) (t - t(c)) / n, shifted so that the mean of all contributions is t. For
a mean of scores, a cluster's contributions add up to the sum of its scores; for other metrics they are the delete-one-cluster jackknife's linear
part (Hinkley 1977, Technometrics 19: weighted pseudo-values). Means, clustered errors and sign flips of contributions are therefore those of the
metric, to first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.scores.signflips import TINY, beyond

Floats = NDArray[np.float64]

FEW_CLUSTERS = 8  # with fewer clusters there is no verdict
MANY_CLUSTERS = 20  # with fewer clusters there is a warning; `needs` asks for at least this number
RATIOS = ("perplexity", "weighted_perplexity", "bits_per_byte")  # lm-eval's names of the aggregations
SHARED_RANGE = ("f1",)  # lm-eval's names of aggregations of a whole corpus that lie in [0, 1]
HIGHEST = 700.0  # largest value in nats whose exponential is finite


@lru_cache(4096)
def upper_t(tail: float, df: float) -> float:
    """Return the upper quantile of Student's t."""
    if tail <= 0 or tail > 0.5:
        return math.inf if tail <= 0 else -upper_t(1 - tail, df)
    u, step, df = 0.0, 1.0, max(df, 1)
    missed = 2 * tail * beyond(0.0, df)
    while step > 1e-9 * u:  # Newton's steps only rise, because the tail is convex in u
        step = (beyond(u, df) - missed) * math.cosh(u) ** df / math.sqrt(df)
        u += step
    return math.sqrt(df) * math.sinh(u)


def brier_score(right: int, probabilities: Sequence[float]) -> float:
    """Return the Brier score of one item: the squared distances of the choices' probabilities from 1 (right choice) and 0 (others)."""
    return float(sum((p - (i == right)) ** 2 for i, p in enumerate(probabilities)))


def codes(labels: Sequence[Any] | NDArray[Any]) -> NDArray[np.intp]:
    """Return cluster labels as numbers 0..k-1, in order of first appearance."""
    if isinstance(labels, np.ndarray):  # in half the time of the loop below
        numbered = labels.dtype == np.intp and labels.size and labels[0] == 0 == labels.min()
        if numbered and (np.diff(np.maximum.accumulate(labels)) <= 1).all():
            return labels
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        return first.argsort().argsort()[inverse]
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.intp)


def effective_clusters(sizes: Floats | NDArray[np.intp]) -> float:
    """Return the effective number of clusters: (sum of sizes)^2 / sum of squared sizes."""
    return float(np.sum(sizes)) ** 2 / float(np.sum(np.square(sizes, dtype=np.float64)))


def clustered_se(values: Floats, cluster: NDArray[np.intp]) -> float:
    """Return the cluster-robust standard error of a mean, infinite for a single cluster.

    The estimator is CR2, which scales each cluster's deviation by its leverage. For clusters of equal size it equals CR1, the factor k/(k-1).
    """
    k = int(cluster.max()) + 1
    if k < 2:
        return math.inf
    sizes = np.bincount(cluster, minlength=k)
    deviations = np.bincount(cluster, values, k) - sizes * values.mean()
    return float(np.sqrt((deviations**2 / (1 - sizes / values.size)).sum()) / values.size)


def score_interval(values: Floats, cluster: NDArray[np.intp]) -> tuple[float, float]:
    """Return the 95 % interval of a mean score.

    For right/wrong items it is Wilson's interval on the effective number of items, n / design effect, with a t quantile, so that 0 of 40 gives
    [0, 0.09] and not [0, 0]. The design effect is the clustered variance divided by the binomial variance, at least 1, and at least that of
    `_expected_correlation`: where few clusters have an item of the rarer answer, the variance between clusters is hardly seen. For other
    scores the interval is mean +- t * clustered SE, clipped to [0, 1] if all values lie there. The degrees of freedom of t are the effective
    number of clusters minus 1.
    """
    n, k, mean = values.size, int(cluster.max()) + 1, float(values.mean())
    inside = bool(values.min() >= 0 and values.max() <= 1)
    if k < 2:
        return (0.0, 1.0) if inside else (-math.inf, math.inf)
    sizes = np.bincount(cluster)
    t, se = upper_t(0.025, effective_clusters(sizes) - 1), clustered_se(values, cluster)
    if not np.isin(values, (0.0, 1.0)).all():
        low, high = mean - t * se, mean + t * se
        return (max(low, 0.0), min(high, 1.0)) if inside else (low, high)
    spread = mean * (1 - mean)
    seen = se**2 * n / spread if spread > TINY else 1.0
    expected = 1 + (n / effective_clusters(sizes) - 1) * _expected_correlation(
        np.bincount(cluster, values).astype(np.intp), sizes
    )
    effective = n / max(seen, expected)
    share = effective + t**2
    center = (mean * effective + t**2 / 2) / share
    half = t * math.sqrt(spread * effective + t**2 / 4) / share
    return max(0.0, center - half), min(1.0, center + half)


def _expected_correlation(right: NDArray[np.intp], sizes: NDArray[np.intp]) -> float:
    """Return the correlation of right/wrong items within clusters that few clusters with the rarer answer leave possible.

    It is the posterior mean of a beta-binomial distribution under the prior density 2 rho. With more than 12 clusters that have an item of the
    rarer answer it fades, because the clustered variance then shows the correlation. All of this was chosen by simulation: without it, the
    interval of a true score of .97 to .99 covers 36 to 90 % if clusters are nearly all right or nearly all wrong.
    """
    mean, rho = (right.sum() + 1) / (sizes.sum() + 2), (np.arange(20) + 0.5) / 20
    a, b = mean * (1 - rho) / rho, (1 - mean) * (1 - rho) / rho
    fit = _log_rising(right, a) + _log_rising(sizes - right, b) - _log_rising(sizes, a + b)
    weight = rho * np.exp(fit - fit.max())
    mixed = int((sizes > right).sum() if mean > 0.5 else (right > 0).sum())
    return float(weight @ rho / weight.sum()) * min(1.0, 12 / max(mixed, 1))


def _log_rising(counts: NDArray[np.intp], start: Floats) -> Floats:
    """Return the sum of log(start (start + 1) ... (start + n - 1)) over the counts n, for each start."""
    more = counts.size - np.bincount(counts).cumsum()[:-1]  # counts above 0, 1, ...
    return np.asarray(more @ np.log(start + np.arange(more.size)[:, None]))


def score(kind: str | None, values: Floats, weights: Floats | None = None) -> float:
    """Return a metric over items.

    Args:
        kind: None for a mean; a ratio of sums (`RATIOS`); or lm-eval's aggregation of a whole corpus, with `corpus.contributions` as values.
        values: Scores, numerators or contributions of the items.
        weights: Weights of the items, for a ratio.
    """
    return float(values.mean()) if weights is None or kind is None else ratio(kind, values, weights)


def interval(kind: str | None, values: Floats, cluster: NDArray[np.intp], weights: Floats | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a metric over items, with the arguments of `score`.

    For a metric of a whole corpus it is the metric +- t * its jackknife error over clusters. It has no ends if most clusters have
    the same influence on the metric and fewer than 8 another one, as with a smallest value: the jackknife then says nothing.
    """
    if kind is None:
        return score_interval(values, cluster)
    if weights is not None:
        return ratio_interval(kind, values, weights, cluster)
    sizes, mean = np.bincount(cluster), float(values.mean())
    shares = np.bincount(cluster, values) / sizes
    _, same = np.unique(np.round(shares / max(1.0, float(np.abs(shares).max())), 9), return_counts=True)
    low, high = -math.inf, math.inf
    if 2 * same.max() <= len(sizes) or len(sizes) - same.max() >= FEW_CLUSTERS:
        half = upper_t(0.025, effective_clusters(sizes) - 1) * clustered_se(values, cluster)
        low, high = mean - half, mean + half
    return (max(low, 0.0), min(high, 1.0)) if kind in SHARED_RANGE else (low, high)


def ratio(kind: str, numerators: Sequence[float] | Floats, weights: Sequence[float] | Floats) -> float:
    """Return a corpus metric: exp(-sum of numerators / sum of weights) for perplexities, the same quotient in bits for bits_per_byte.

    Numerators are log-likelihoods in nats. A perplexity is at most exp(700).
    """
    if kind not in RATIOS:
        raise ValueError(f"kind of ratio {kind!r}: expected one of {', '.join(RATIOS)}")
    rate = -float(np.sum(numerators)) / float(np.sum(weights))
    return rate / math.log(2) if kind == "bits_per_byte" else math.exp(min(rate, HIGHEST))


def ratio_interval(
    kind: str,
    numerators: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    cluster: NDArray[np.intp],
) -> tuple[float, float]:
    """Return the 95 % interval of a corpus metric: rate +- t * jackknife error in nats, with both ends converted to the metric.

    The jackknife deletes one cluster at a time, and t has K-1 degrees of freedom, where K = (sum of weights)^2 / sum of squared weights of
    clusters: one long document among short ones counts as few documents. For equal weights this is the clustered error of a mean.
    A percentile bootstrap of clusters has lower coverage if clusters are few or differ in weight; see tests/scores/test_error_rates.py.
    """
    x = np.asarray(numerators, np.float64)
    (rate,), covariance, df = clustered_rates(-x[None], np.asarray(weights, np.float64), cluster)
    if not math.isfinite(df):
        return (0.0 if kind == "bits_per_byte" else 1.0), math.inf
    half = upper_t(0.025, df) * math.sqrt(covariance[0, 0])
    return ratio(kind, [half - rate], [1.0]), ratio(kind, [-half - rate], [1.0])


def clustered_rates(losses: Floats, weights: Floats, cluster: NDArray[np.intp]) -> tuple[Floats, Floats, float]:
    """Return the rates (sums of losses divided by the sum of weights) with their jackknife covariance over clusters.

    Args:
        losses: Losses in nats [m, items].
        weights: Weights of the items [items].
        cluster: Cluster of each item [items].

    Returns:
        Rates [m], covariance [m, m], degrees of freedom.
    """
    k = int(cluster.max()) + 1
    sums, sizes = np.stack([np.bincount(cluster, row, k) for row in losses]), np.bincount(cluster, weights, k)
    total = float(sizes.sum())
    rates = sums.sum(1) / total
    effective = effective_clusters(sizes)
    if effective < 1 + 1e-9:
        return rates, np.full((len(rates), len(rates)), math.inf), math.inf
    change = (sums - rates[:, None] * sizes) / (total - sizes)  # change of the rate when a cluster is deleted
    return rates, (k - 1) / k * change @ change.T, max(effective - 1, 1.0)


@lru_cache(maxsize=16)
def resampled_clusters(clusters: int, seed: int, reps: int = 2000) -> Floats:
    """Return how often each cluster is drawn in resamples with replacement, as [reps, clusters]."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), reps).astype(np.float64)


def resampled_means(values: Floats, cluster: NDArray[np.intp], *, seed: int, reps: int = 2000) -> Floats:
    """Return means of `values` [configurations, items] under resampled clusters, as [configurations, reps].

    All rows share the same draws, so that ratios and differences between them stay paired.
    """
    k = int(cluster.max()) + 1
    counts = resampled_clusters(k, seed, reps)
    sums = np.stack([np.bincount(cluster, row, k) for row in np.atleast_2d(values)])
    return np.asarray(sums @ counts.T / (counts @ np.bincount(cluster, minlength=k)))


def expanded_tail(tail: float, clusters: float) -> float:
    """Return the tail of a percentile interval from resampled clusters that makes it as wide as the t interval (Hesterberg 2015)."""
    return math.erfc(math.sqrt(clusters / (clusters - 1) / 2) * upper_t(tail, clusters - 1)) / 2


Function = Callable[[list[Any]], float]
"""Maps the values of all items to the metric, like lm-eval's aggregations."""


Compute = Callable[[str, Sequence[Any], NDArray[np.intp]], Floats | None]
"""Returns the contributions of values [items] in clusters to lm-eval's aggregation of a name; None if it has none of this name."""


@dataclass(frozen=True)
class Sums:
    """Counts [items, counts] whose sums determine a metric, and the metric of such sums."""

    metric: Callable[[NDArray[Any]], float]
    counts: NDArray[Any]


class UndefinedError(ValueError):
    """A corpus metric has no value on these items."""


def contributions(function: Function, values: Sequence[Any], cluster: NDArray[np.intp], sums: Sums | None = None) -> Floats:
    """Return one contribution per item [items], whose mean is the metric.

    Args:
        function: lm-eval's aggregation.
        values: Value of each item, as the task's `process_results` returns it.
        cluster: Cluster of each item, numbered from 0.
        sums: A faster way to the same metric, which is used if it agrees on all items.

    Raises:
        UndefinedError: If the function fails, or its result is not a finite number, on all items or without one of the clusters.
    """
    whole = _number(function, values, "all items")
    sizes = np.bincount(cluster).astype(np.float64)
    if len(sizes) < 2:
        return np.full(len(values), whole)
    members: list[list[int]] = [[] for _ in sizes]
    for i, c in enumerate(cluster):
        members[c].append(i)
    if sums and math.isclose(sums.metric(sums.counts.sum(0)), whole, rel_tol=1e-12, abs_tol=1e-12):
        total = sums.counts.sum(0)
        without = np.array([sums.metric(total - sums.counts[inside].sum(0)) for inside in members])
    else:
        without = np.array(list(_without(function, values, members)))
    shifts = (len(values) - sizes) * (whole - without)
    return np.asarray((whole + shifts / sizes - shifts.sum() / len(values))[cluster])


def _without(function: Function, values: Sequence[Any], members: Sequence[Sequence[int]]) -> Iterator[float]:
    """Yield the metric without each cluster. Clusters with equal values have equal results, so that F1 of single items needs four calls."""
    known: dict[str, float] = {}
    for inside in members:
        key = repr(sorted(repr(values[i]) for i in inside))
        if key not in known:
            left_out = set(inside)
            kept = [v for i, v in enumerate(values) if i not in left_out]
            known[key] = _number(function, kept, f"all items but {len(inside)} of one cluster")
        yield known[key]


def _number(function: Function, values: Sequence[Any], items: str) -> float:
    """Return the metric of some items as a finite number."""
    try:
        result = float(function(list(values)))
    except Exception as error:  # a task's own function may raise anything
        raise UndefinedError(f"fails on {items}: {type(error).__name__}: {str(error)[:120]}") from error
    if not math.isfinite(result):
        raise UndefinedError(f"is {result} on {items}")
    return result
