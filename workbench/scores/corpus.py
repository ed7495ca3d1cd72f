"""Metrics of a whole corpus (F1, MCC, BLEU, a task's own aggregation), as one contribution of each item.

lm-eval computes such a metric by one function of all items. Let it be t on N items, and t(c) without cluster c of n items. Each item of c
contributes t + (N - n) (t - t(c)) / n, shifted so that the mean of all contributions is t. For a mean of scores, a cluster's contributions add
up to the sum of its scores; for other metrics they are the delete-one-cluster jackknife's linear part (Hinkley 1977, Technometrics 19: weighted
pseudo-values). Means, clustered errors and sign flips of contributions are therefore those of the metric, to first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.scores.statistics import Floats

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
