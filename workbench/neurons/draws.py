"""Items by function and task, and resampled tasks: intervals of statistics of neurons that have no formula.

Items of a task are not independent, so that tasks are resampled, within each function. A function with few tasks gives wide intervals.
Sources: Davison and Hinkley 1997, section 3.2 (stratified bootstrap); Hesterberg 2015 (expanded percentiles).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.activations.labelled import Item
from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.scores.statistics import Floats, clustered_rates, codes, upper_t

if TYPE_CHECKING:
    from torch import Tensor

REPS = 2000
"""Number of resamplings."""


@dataclass(frozen=True)
class ItemGroups:
    """Functions and clusters of items.

    Attributes:
        functions: The functions, in the order of columns.
        function: Function of each item [items].
        cluster: Cluster of each item [items], from 0: its task, or the item itself in functions with one task.
        warnings: Sentences about functions with too few tasks.
    """

    functions: tuple[str, ...]
    function: NDArray[np.intp]
    cluster: NDArray[np.intp]
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, items: Sequence[Item], functions: Sequence[str] | None = None) -> ItemGroups:
        """Return the groups of some items.

        Args:
            items: The items.
            functions: Order of the functions; that of first appearance if omitted.

        Raises:
            WorkbenchError: If a function has no items, or an item has another function.
        """
        names = tuple(functions) if functions is not None else tuple(dict.fromkeys(item.function for item in items))
        present = {item.function for item in items}
        if missing := [name for name in names if name not in present]:
            raise WorkbenchError(
                f"function '{missing[0]}' has no items to measure losses on", "Add held-out texts of this function."
            )
        if unknown := sorted(present - set(names)):
            raise WorkbenchError(f"items have the function '{unknown[0]}', which is not among {', '.join(names)}", None)
        tasks = {name: {item.task for item in items if item.function == name} for name in names}
        single = {name for name, of in tasks.items() if len(of) < 2}
        labels: list[Any] = [
            (item.function, number) if item.function in single else (item.function, item.task, "task")
            for number, item in enumerate(items)
        ]
        warnings = tuple(
            f"function '{name}' has one held-out task: its interval treats items as independent and is too narrow"
            for name in names
            if name in single
        )
        return cls(names, np.array([names.index(item.function) for item in items], np.intp), codes(labels), warnings)

    @property
    def columns(self) -> Tensor:
        """Function of each item [items]."""
        return torch.from_numpy(self.function.astype(np.int64))

    def clusters(self, function: int) -> int:
        """Return the number of clusters of a function."""
        return len(np.unique(self.cluster[self.function == function]))

    def weights(self, *, seed: int = 0, reps: int = REPS) -> Tensor:
        """Return how often each item counts when the clusters of each function are resampled [reps, items]."""
        generator = np.random.default_rng(seed)
        weights = np.empty((reps, len(self.cluster)))
        for number in range(len(self.functions)):
            own = self.function == number
            present, position = np.unique(self.cluster[own], return_inverse=True)
            counts = generator.multinomial(len(present), np.full(len(present), 1 / len(present)), reps)
            weights[:, own] = counts[:, position]
        return torch.from_numpy(weights)

    def interval(self, draws: Tensor, function: int | None = None, alpha: float = 0.05) -> tuple[Tensor, Tensor]:
        """Return the ends of expanded percentile intervals.

        Percentiles of resampled clusters are too narrow if clusters are few. The tail is therefore that of a t interval with the same
        number of clusters, widened by √(k / (k − 1)) for k clusters in each function.

        Args:
            draws: A statistic under resampled clusters [reps, ...].
            function: The function that it depends on; None for all.
            alpha: One minus the confidence.
        """
        from scipy.special import ndtr

        sizes = [self.clusters(n) for n in (range(len(self.functions)) if function is None else [function])]
        freedom = sum(size - 1 for size in sizes)
        if not freedom:
            return torch.full(draws.shape[1:], -math.inf), torch.full(draws.shape[1:], math.inf)
        widening = math.sqrt(sum(sizes) / freedom)
        tail = float(ndtr(-widening * upper_t(alpha / 2, freedom)))
        values = draws.numpy()
        low = np.quantile(values, tail, axis=0, method="lower")
        high = np.quantile(values, 1 - tail, axis=0, method="higher")
        return torch.as_tensor(low), torch.as_tensor(high)


def loss_rise(changed: Floats, base: Floats, tokens: Floats, cluster: NDArray[np.intp]) -> tuple[float, float, float]:
    """Return the rise of the loss in nats per token with its 95 % interval, t · jackknife error over clusters.

    Args:
        changed: Loss of each item on the changed model [items].
        base: Its loss on the unchanged model [items].
        tokens: Its number of predicted tokens [items], all above 0.
        cluster: Its cluster [items], from 0.
    """
    (rise,), covariance, df = clustered_rates((changed - base)[None], tokens, cluster)
    half = upper_t(0.025, df) * math.sqrt(covariance[0, 0]) if math.isfinite(df) else math.inf
    return float(rise), float(rise) - half, float(rise) + half
