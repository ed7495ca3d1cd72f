"""Metrics of a whole corpus (F1, MCC, BLEU, a task's own aggregation), as one contribution of each item.

lm-eval computes such a metric by one function of all items. Let it be t on N items, and t(c) without cluster c of n items. Each item of c
contributes t + (N - n) (t - t(c)) / n, shifted so that the mean of all contributions is t. For a mean of scores, a cluster's contributions add
up to the sum of its scores; for other metrics they are the delete-one-cluster jackknife's linear part (Hinkley 1977, Technometrics 19: weighted
pseudo-values). Means, clustered errors and sign flips of contributions are therefore those of the metric, to first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.scores.statistics import Floats

Function = Callable[[list[Any]], float]
"""Maps the values of all items to the metric, like lm-eval's aggregations."""


class UndefinedError(ValueError):
    """A corpus metric has no value on these items."""


def contributions(function: Function, values: Sequence[Any], cluster: NDArray[np.intp]) -> Floats:
    """Return one contribution per item [items], whose mean is the metric.

    Args:
        function: lm-eval's aggregation.
        values: Value of each item, as the task's `process_results` returns it.
        cluster: Cluster of each item, numbered from 0.

    Raises:
        UndefinedError: If the function fails, or its result is not a finite number, on all items or without one of the clusters.
    """
    whole = _number(function, values, "all items")
    sizes = np.bincount(cluster).astype(np.float64)
    if len(sizes) < 2:
        return np.full(len(values), whole)
    without = np.array(list(_without(function, values, cluster, whole)))
    shifts = (len(values) - sizes) * (whole - without)
    return np.asarray((whole + shifts / sizes - shifts.sum() / len(values))[cluster])


def aggregation(name: str) -> Function | None:
    """Return lm-eval's function of a registered aggregation; None if it has none of this name, or is not installed."""
    try:
        from lm_eval.api import metrics  # noqa: F401  registers the aggregations
        from lm_eval.api.registry import aggregation_registry
    except ImportError:
        return None
    function: Function | None = aggregation_registry.get(name, None)
    return function


def _without(function: Function, values: Sequence[Any], cluster: NDArray[np.intp], whole: float) -> Iterator[float]:
    """Yield the metric without each cluster. Clusters with equal values have equal results, so that F1 of single items needs four calls."""
    members: list[list[int]] = [[] for _ in range(int(cluster.max()) + 1)]
    for i, c in enumerate(cluster):
        members[c].append(i)
    if (sums := _sums(function, values)) is not None:
        score, rows = sums
        total = rows.sum(0)
        if math.isclose(score(total), whole, rel_tol=1e-12, abs_tol=1e-12):
            yield from (score(total - rows[inside].sum(0)) for inside in members)
            return
    known: dict[str, float] = {}
    for inside in members:
        key = repr(sorted(repr(values[i]) for i in inside))
        if key not in known:
            left_out = set(inside)
            known[key] = _number(
                function, [v for i, v in enumerate(values) if i not in left_out], f"all items but {len(inside)} of one cluster"
            )
        yield known[key]


def _sums(function: Function, values: Sequence[Any]) -> tuple[Callable[[Any], float], NDArray[Any]] | None:
    """Return the counts [items, counts] whose sums give a metric of sacrebleu, with the metric of such sums; None for other metrics.

    Counting each item once makes the jackknife of 1,000 translations 500 times as fast.
    """
    try:
        from lm_eval.api import metrics
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
        from sacrebleu.metrics.ter import TER
    except ImportError:
        return None
    known: dict[Any, Any] = {metrics.bleu: BLEU, metrics.chrf: CHRF, metrics.chrfpp: lambda: CHRF(word_order=2), metrics.ter: TER}
    if function not in known:
        return None
    metric = known[function]()
    references, hypotheses = metrics._sacreformat(*zip(*values, strict=True))
    rows = np.array(metric._extract_corpus_statistics(hypotheses, references))
    return lambda total: float(metric._compute_score_from_stats(total.tolist()).score), rows


def _number(function: Function, values: Sequence[Any], items: str) -> float:
    """Return the metric of some items as a finite number."""
    try:
        result = float(function(list(values)))
    except Exception as error:  # a task's own function may raise anything
        raise UndefinedError(f"fails on {items}: {type(error).__name__}: {str(error)[:120]}") from error
    if not math.isfinite(result):
        raise UndefinedError(f"is {result} on {items}")
    return result
