"""Simulated evaluations: clusters of several shapes, answers with and without a true difference, and the comparison's rows of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from workbench.compare.differences import Difference, differences
from workbench.compare.tables import Table
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite

MOST = 0.065  # false verdicts at a level of 5 %
MOST_ONE_SIDED = 0.035  # at 2.5 %
BASE = Configuration("b" * 32, "base", "base")


def clusters(shape: str, k: int, n: int, rng: np.random.Generator) -> Any:
    """Labels of about n items in k clusters: of one size, log-normal, Zipf, or half of the items in one."""
    weight = {
        "equal": np.ones(k),
        "lognormal": np.exp(rng.normal(size=k)),
        "zipf": 1 / np.arange(1, k + 1),
        "half": np.r_[k - 1.0, np.ones(k - 1)],
    }[shape]
    return np.repeat(np.arange(k), np.maximum(1, np.round(weight / weight.sum() * n)).astype(int))


def answers(
    rng: np.random.Generator, cluster: Any, configurations: int = 1, *, gain: float = 0.0, by_cluster: float = 0.0
) -> Any:
    """Right (1) or wrong (0) of the base and of others [1 + configurations, items]: items and clusters differ in difficulty, and
    what a configuration gains varies by cluster. By symmetry no configuration gains on average if `gain` is 0."""
    k, n = int(cluster.max()) + 1, cluster.size
    hard = rng.normal(size=n) + 0.7 * rng.normal(size=k)[cluster]
    noise = 0.6 * rng.normal(size=(1 + configurations, n))
    noise[1:] += gain + by_cluster * rng.normal(size=(configurations, k))[:, cluster]
    return (hard + noise > 0).astype(float)


def gained(gain: float, by_cluster: float = 0.0) -> float:
    """The true difference of the answers above."""
    return float(stats.norm.cdf(gain / np.sqrt(1 + 0.7**2 + 0.6**2 + by_cluster**2)) - 0.5)


def sparse(rng: np.random.Generator, cluster: Any, loss: float) -> Any:
    """Right answers of which few change, 1.5 % more than `loss` to wrong, 1.5 % to right; rates vary by cluster."""
    k = int(cluster.max()) + 1
    down, up = (rng.beta(rate * 20, (1 - rate) * 20, k)[cluster] for rate in (loss + 0.015, 0.015))
    draw = rng.random(cluster.size)
    before = rng.random(cluster.size) < 0.5
    # Each half changes in one direction alone, so that twice the rate gives the loss over both.
    after = np.where(before, draw >= np.minimum(2 * down, 1), draw < np.minimum(2 * up, 1))
    return np.stack([before, after]).astype(float)


def one_way(rng: np.random.Generator, cluster: Any, loss: float, configurations: int = 1) -> Any:
    """Answers that are all right before; some are lost, none is won. Rates vary by cluster, or, with items of their own, do not."""
    k = int(cluster.max()) + 1
    rates = rng.beta(loss * 20, (1 - loss) * 20, (configurations, k)) if k < cluster.size else np.full((configurations, k), loss)
    after = rng.random((configurations, cluster.size)) >= rates[:, cluster]
    return np.concatenate([np.ones((1, cluster.size)), after.astype(float)])


def continuous(rng: np.random.Generator, cluster: Any, loss: float) -> Any:
    """Scores without a range, such as margins in nats; what is lost varies by cluster."""
    before = rng.normal(size=cluster.size)
    k = int(cluster.max()) + 1
    return np.stack([before, before - loss + 0.3 * rng.normal(size=k)[cluster] + 0.5 * rng.normal(size=cluster.size)])


def draw(kind: str, rng: np.random.Generator, cluster: Any, loss: float) -> tuple[Any, float]:
    """Scores [2, items] of the base and of a configuration, and the true loss."""
    if kind == "two-way":
        gain = stats.norm.ppf(0.5 - loss) * np.sqrt(1 + 0.7**2 + 0.6**2 + 0.5**2)
        return answers(rng, cluster, gain=gain, by_cluster=0.5), -gained(gain, 0.5)
    return {"sparse": sparse, "one-way": one_way, "continuous": continuous}[kind](rng, cluster, loss), loss


def table(values: Any, cluster: Any, *, margin: float, task: str = "t", guarded: bool = False, **suite: Any) -> Table:
    """A task's scores: the base first, then configurations c1, c2, ..."""
    suite = Suite(suite="s", tasks=(task,), min_effect={task: margin}, roles={task: "guarded"} if guarded else {}, **suite)
    digests = [BASE.digest, *(f"{i:032d}" for i in range(1, len(values)))]
    return Table(task, "acc", suite, "p", [{}] * cluster.size, cluster, dict(zip(digests, values, strict=True)), {})


def rows(*tables: Table, alpha: float = 0.05) -> list[Difference]:
    """Rows of a comparison of all configurations with the base, as `compare` makes them."""
    found = dict.fromkeys(digest for t in tables for digest in t.values if digest != BASE.digest)
    return differences(tables, BASE, [Configuration(digest, f"c{int(digest)}") for digest in found], alpha)


def share(found: Iterable[bool]) -> float:
    return float(np.mean(list(found)))
