"""Null distributions of the best score: labels shuffled over items, and over whole tasks.

The best of many neurons scores far above chance on random labels, so it is compared with the best on shuffled labels. Labels shuffled over
items break the link between an item and its function. A neuron that recognizes the wording of one task still beats that null, because the items of a
task stay alike; labels shuffled over whole tasks keep tasks together and break only the link between a task and its function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from workbench.emergent.labelled import Item

Null: TypeAlias = Literal["item", "task"]
Bools: TypeAlias = NDArray[np.bool_]
_TRIES = 200


def labels_of(items: Sequence[Item], functions: Sequence[str]) -> Bools:
    """Return [functions, items]: whether an item has a function."""
    return np.array([[item.function == name for item in items] for name in functions])


def shuffled_over_items(labels: Bools, draws: int, seed: int) -> Bools:
    """Return labels with their items shuffled [draws, functions, items]; every draw keeps the number of items of each function."""
    rng = np.random.default_rng([seed, 0])
    return np.stack([labels[:, rng.permutation(labels.shape[1])] for _ in range(draws)])


def shuffled_over_tasks(items: Sequence[Item], functions: Sequence[str], draws: int, seed: int) -> Bools | None:
    """Return labels whose tasks have been shuffled [draws, functions, items]; None if no function has several tasks.

    Each draw gives every function as many tasks as it has, drawn from all tasks. A function never gets exactly its own tasks, since that would
    be its own score and not a null.

    Args:
        items: The items.
        functions: Names of the functions.
        draws: Number of draws.
        seed: Seed of the draws.
    """
    owners = dict.fromkeys((item.function, item.task) for item in items)
    tasks = list(owners)
    own = np.array([functions.index(function) for function, _ in tasks])
    if np.bincount(own, minlength=len(functions)).max() < 2:
        return None
    of_item = np.array([tasks.index((item.function, item.task)) for item in items])
    rng = np.random.default_rng([seed, 1])
    result = []
    for _ in range(draws):
        shuffled = own
        for _ in range(_TRIES):
            shuffled = rng.permutation(own)
            if not any(((shuffled == f) == (own == f)).all() for f in range(len(functions))):
                break
        result.append([shuffled[of_item] == f for f in range(len(functions))])
    return np.array(result)


@dataclass(frozen=True)
class NullMaxima:
    """The best scores on shuffled labels.

    Attributes:
        layers: Best score of each layer [draws, functions, layers].
    """

    layers: NDArray[np.float64]

    def limit(self, alpha: float = 0.01) -> float:
        """Return the score that the best neuron of a layer exceeds with probability alpha on shuffled labels.

        It is the quantile over draws, functions and layers, whose order statistic is rounded up.
        """
        return _upper(self.layers.ravel(), alpha)

    def level(self, alpha: float = 0.01) -> float:
        """Return the probability that `limit` stands for: alpha, or more if there are too few values for it."""
        return max(alpha, 1 / (self.layers.size + 1))

    def limit_of_model(self, alpha: float = 0.01) -> float:
        """Return the same limit for the best neuron of the whole model; with fewer than 1/alpha draws, the largest draw."""
        return _upper(self.layers.max(2).ravel(), alpha)


def _upper(values: NDArray[np.float64], alpha: float) -> float:
    """Return the smallest value that at most a share alpha of the values, with one more value at infinity, exceeds."""
    ordered = np.sort(values)
    place = min(len(ordered) - 1, math.ceil((1 - alpha) * (len(ordered) + 1)) - 1)
    return float(ordered[place])
