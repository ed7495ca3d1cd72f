"""Scores of the regression tasks: the error of the number that was written, and of plain fits to the same pairs.

`error` is |written - true| divided by the range of the shown y, at most 1; an answer without a number has error 1.
The fits see what a reader of functions-stripped sees, five pairs (x, y) and a sixth x, and are scored alike. They depend on the
items alone, so every configuration's row shows the same numbers: what an error means is read beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
Pairs = tuple[tuple[float, float], ...]

# A comma stands between groups of three digits only: "1,200 m" is 1200, "3, 4" is 3.
NUMBER = re.compile(r"[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-\u2212]?\.\d+")
HIDDEN = 16
DECAY = 1e-4
STEPS = 30  # enough for five pairs; further ones follow rounding errors to other weights on other machines
SEED = 0


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`error` (lower is better) and `within_10` (the number is within 10 % of the true one) of one answer."""
    truth, written = float(doc["answer"]), parse(results[0])
    near = written is not None and abs(written - truth) <= 0.1 * abs(truth) + 1e-12
    return {"error": error(written, truth, pairs_of(doc)), "within_10": float(near)}


def score_with_fits(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The same, and the errors of the mean, a line, the nearest and the three nearest neighbours and a small network."""
    shown, truth = pairs_of(doc), float(doc["answer"])
    found = {f"error_{name}": error(fit(shown, float(doc["query"])), truth, shown) for name, fit in FITS.items()}
    return {**score(doc, results), **found}


def parse(text: str) -> float | None:
    """The first number of an answer; None without one."""
    found = NUMBER.search(text)
    return float(found[0].replace(",", "").replace("\u2212", "-")) if found else None


def error(written: float | None, truth: float, shown: Pairs) -> float:
    """Absolute error in ranges of the shown y, clipped to [0, 1]."""
    if written is None:
        return 1.0
    ys = [y for _, y in shown]
    return min(abs(written - truth) / (max(ys) - min(ys)), 1.0)


def pairs_of(doc: Mapping[str, Any]) -> Pairs:
    """The pairs that a problem shows."""
    return tuple((float(x), float(y)) for x, y in doc["shown"])


def mean(shown: Pairs, query: float) -> float:
    """The mean of the shown y, whatever is asked: what an answer is worth that follows no pattern."""
    return float(np.mean([y for _, y in shown]))


def linear(shown: Pairs, query: float) -> float:
    """Least squares of a line."""
    x, y = np.array(shown).T
    slope, level = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    return float(slope * query + level)


def nearest(count: int) -> Callable[[Pairs, float], float]:
    """Mean y of the `count` nearest x; of two as near, the one shown first."""

    def predict(shown: Pairs, query: float) -> float:
        x, y = np.array(shown).T
        return float(y[np.argsort(np.abs(x - query), kind="stable")[:count]].mean())

    return predict


@cache
def network(shown: Pairs, query: float) -> float:
    """A network with one hidden layer of 16 tanh units on standardised x and y, fitted by L-BFGS from fixed weights.

    Kept for each problem: every configuration asks for it again.
    """
    x, y = np.array(shown).T
    scaled, target = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    found = minimize(loss, start(), (scaled, target), "L-BFGS-B", jac=True, options={"maxiter": STEPS})
    return float(forward(found.x, np.array([(query - x.mean()) / x.std()]))[0] * y.std() + y.mean())


def start() -> Array:
    """Weights [in, bias, out, bias] as Glorot draws them, from a fixed seed."""
    random = np.random.RandomState(SEED)  # its stream never changes between versions of numpy
    bound = np.sqrt(6 / (1 + HIDDEN))
    inner, bias, outer = (random.uniform(-bound, bound, HIDDEN) for _ in range(3))
    return np.concatenate([inner, bias, outer, [0.0]])


def forward(weights: Array, x: Array) -> Array:
    """The network's output for each x."""
    inner, bias, outer = weights[: 3 * HIDDEN].reshape(3, HIDDEN)
    return np.tanh(np.outer(x, inner) + bias) @ outer + weights[-1]


def loss(weights: Array, x: Array, y: Array) -> tuple[float, Array]:
    """Half the mean squared error plus weight decay on all but the biases, and its gradient."""
    inner, bias, outer = weights[: 3 * HIDDEN].reshape(3, HIDDEN)
    units = np.tanh(np.outer(x, inner) + bias)  # [pair, unit]
    miss = units @ outer + weights[-1] - y
    back = np.outer(miss, outer) * (1 - units**2)
    gradient = [back.T @ x + DECAY * inner, back.sum(0), units.T @ miss + DECAY * outer, [miss.sum()]]
    value = (miss @ miss + DECAY * (inner @ inner + outer @ outer)) / 2
    return float(value / len(x)), np.concatenate(gradient) / len(x)


FITS: dict[str, Callable[[Pairs, float], float]] = {
    "mean": mean,
    "linear": linear,
    "1nn": nearest(1),
    "3nn": nearest(3),
    "mlp": network,
}
