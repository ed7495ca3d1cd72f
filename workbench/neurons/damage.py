"""Damage matrices with intervals: what each function loses when the neurons, or the brick, of a function are removed.

Rows are removed sets or bricks, columns are functions, and row i serves function i. Items of a task are not independent, so that tasks are
resampled within each function for the intervals; a function with few tasks gives wide ones.

Sources: the questions of Xiao et al. 2024, arXiv 2409.02877, section 5.3, which gives no formulas; the definitions are this project's.
Davison and Hinkley 1997, section 3.2 (stratified bootstrap); Hesterberg 2015 (expanded percentiles).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.activations.labelled import Item
from workbench.activations.losses import ItemLosses, SetLosses
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Measured, Number
from workbench.neurons.controls import Control
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
        sizes = [self.clusters(n) for n in (range(len(self.functions)) if function is None else [function])]
        freedom = sum(size - 1 for size in sizes)
        if not freedom:
            return torch.full(draws.shape[1:], -math.inf), torch.full(draws.shape[1:], math.inf)
        widening = math.sqrt(sum(sizes) / freedom)
        tail = math.erfc(widening / math.sqrt(2) * upper_t(alpha / 2, freedom)) / 2
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


_HIGHEST = 700.0  # largest exponent whose exponential is finite in float64


class Damage(JsonObject):
    """What every function loses when a set is switched off."""

    functions: list[str]
    """Names of rows (switched off) and columns (measured)."""
    changes: list[list[Measured]]
    """(PPL off - PPL) / PPL; null if infinite."""
    low: list[list[Measured]]
    """Lower ends of 95 % intervals."""
    high: list[list[Measured]]
    """Upper ends."""
    dominant: list[bool]
    """Row -> whether its own function loses most."""
    dominance: list[Number]
    """Row -> share of resamplings in which it does."""
    dominant_rows: int
    """Number of such rows."""
    coupling: Measured
    """Median over rows of the mean of the others over the diagonal; null if undefined."""
    interval: list[Measured]
    """95 % interval of the coupling."""
    couplings: list[Measured]
    """Coupling of each row."""


class AblationControl(Damage):
    """Damage by control sets of equal size, as a mean over draws."""

    kind: str
    """random, or matched (by mean activation)."""
    exceeds: list[Number]
    """Function -> share of resamplings in which its own set harms it more than the control."""


class DamageTable(Damage):
    """Damage by functions' neuron sets, or bricks, and by controls of equal size."""

    base_perplexity: list[Measured]
    """Perplexity of each function on the unchanged model."""
    controls: dict[str, AblationControl]
    """Kind of control -> its damage."""
    items: int
    """Number of texts."""
    clusters: list[int]
    """Clusters of each function."""
    warnings: list[str]
    """What the intervals cannot show."""


def damage_table(
    result: SetLosses, items: Sequence[Item], functions: Sequence[str], controls: Sequence[Control] = ()
) -> DamageTable:
    """Return the damage from losses of the items.

    Args:
        result: Losses with each set switched off; its names include the functions and the controls' sets.
        items: The items.
        functions: The functions, in the order of rows and columns.
        controls: The controls.

    Raises:
        WorkbenchError: If a function has no item with a predicted token, or no control of its size.
    """
    _check_tokens(result, ItemGroups.of(items, functions))
    result, items = _counted(result, items)
    groups = ItemGroups.of(items, functions)
    of_set = {name: number for number, name in enumerate(result.names)}
    changes, draws = (perplexity_changes(result, groups.columns, weights) for weights in (None, groups.weights()))
    rows = [of_set[name] for name in functions]
    own = draws[:, rows]
    tables: dict[str, AblationControl] = {}
    for kind in dict.fromkeys(control.kind for control in controls):
        members = [[of_set[c.neurons.name] for c in controls if c.kind == kind and name in c.functions] for name in functions]
        if lacking := [name for name, of in zip(functions, members, strict=True) if not of]:
            raise WorkbenchError(f"function '{lacking[0]}' has no {kind} control of its size", "Make controls for all sets.")
        drawn = torch.stack([draws[:, of].mean(1) for of in members], 1)
        damage = damage_of(functions, torch.stack([changes[of].mean(0) for of in members]), drawn, groups)
        exceeds = own.diagonal(dim1=1, dim2=2) > drawn.diagonal(dim1=1, dim2=2)
        tables[kind] = AblationControl(**dict(damage), kind=kind, exceeds=exceeds.double().mean(0).tolist())
    sums, tokens = (
        torch.zeros(len(functions), dtype=torch.float64).index_add_(0, groups.columns, values.double())
        for values in (result.base.sums, result.tokens)
    )
    return DamageTable(
        **dict(damage_of(functions, changes[rows], own, groups)),
        base_perplexity=(sums / tokens).clamp_max(_HIGHEST).exp().tolist(),
        controls=tables,
        items=len(items),
        clusters=[groups.clusters(number) for number in range(len(functions))],
        warnings=list(groups.warnings),
    )


def damage_of(functions: Sequence[str], changes: Tensor, draws: Tensor, groups: ItemGroups) -> Damage:
    """Summarize a damage matrix.

    Args:
        functions: Names of rows and columns.
        changes: The damage [functions, functions].
        draws: The damage under resampled clusters [reps, functions, functions].
        groups: The clusters.
    """
    ends = [groups.interval(draws[..., column], column) for column in range(len(functions))]
    low, high = (torch.stack([end[side] for end in ends], -1) for side in (0, 1))
    dominant = dominant_rows(changes)
    return Damage(
        functions=list(functions),
        changes=changes.tolist(),
        low=low.tolist(),
        high=high.tolist(),
        dominant=dominant.tolist(),
        dominance=dominant_rows(draws).double().mean(0).tolist(),
        dominant_rows=int(dominant.sum()),
        coupling=float(coupling(changes)),
        interval=[float(end) for end in groups.interval(coupling(draws))],
        couplings=row_couplings(changes).tolist(),
    )


def row_couplings(damage: Tensor) -> Tensor:
    """Return the mean off-diagonal damage of each row divided by its diagonal [..., bricks]; infinite if the diagonal is not positive.

    Args:
        damage: Damage matrices [..., bricks, functions]; square, at least 2 wide.
    """
    size = damage.shape[-1]
    if damage.shape[-2] != size or size < 2:
        raise ValueError(f"expected square damage matrices of at least 2 bricks, found {tuple(damage.shape[-2:])}")
    own = damage.diagonal(dim1=-2, dim2=-1)
    others = (damage.sum(-1) - own) / (size - 1)
    return torch.where(own > 0, others / own, torch.inf)


def coupling(damage: Tensor) -> Tensor:
    """Return the median over rows of mean off-diagonal damage / diagonal damage [...].

    It is 0 if removing a brick harms only its own function, and about 1 if it harms all functions alike. The mean of an even number of
    rows' two middle values counts. A ratio of means would depend on the row with the largest damage alone.

    Args:
        damage: Damage matrices [..., bricks, functions].
    """
    rows = row_couplings(damage).sort(-1).values
    size = rows.shape[-1]
    return (rows[..., (size - 1) // 2] + rows[..., size // 2]) / 2


def dominant_rows(damage: Tensor) -> Tensor:
    """Return, for each row, whether its diagonal exceeds every other entry of the row [..., bricks] bool.

    Columns are not compared: some functions are harmed by every brick, so that a column's largest entry says little about a brick.

    Args:
        damage: Damage matrices [..., bricks, functions].
    """
    own = damage.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.eye(damage.shape[-1], dtype=torch.bool, device=damage.device)
    return own > damage.masked_fill(diagonal, -torch.inf).amax(-1)


def perplexity_changes(result: SetLosses, functions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return (PPL_off − PPL) / PPL of each function on each changed version [..., versions, functions].

    Args:
        result: Losses of the items.
        functions: Function of each item [items], from 0.
        weights: How often each item counts [..., items], such as its number in resampled clusters; once if omitted.
    """
    count = int(functions.max()) + 1
    member = torch.nn.functional.one_hot(functions.long(), count).double()  # [items, functions]
    rises = (result.sums - result.base.sums).T[:, :, None] * member[:, None]  # [items, versions, functions]
    if weights is None:
        weights = torch.ones(len(functions), dtype=torch.float64)
    tokens = weights.double() @ (result.tokens.double()[:, None] * member)
    totals = weights.double() @ rises.flatten(1)
    changes: Tensor = totals.view(*totals.shape[:-1], *rises.shape[1:]) / tokens[..., None, :]
    return changes.clamp_max(_HIGHEST).expm1()


def _check_tokens(result: SetLosses, groups: ItemGroups) -> None:
    """Check that every function has a predicted token."""
    totals = torch.zeros(len(groups.functions), dtype=torch.long).index_add_(0, groups.columns, result.tokens)
    if bad := [name for name, total in zip(groups.functions, totals.tolist(), strict=True) if not total]:
        raise WorkbenchError(
            f"function '{bad[0]}' has no item with two or more tokens, so that its loss cannot be computed",
            "Add texts of this function.",
        )


def _counted(result: SetLosses, items: Sequence[Item]) -> tuple[SetLosses, list[Item]]:
    """Return the items with predicted tokens. A task without any would leave a function without tokens in some resamplings."""
    index = result.tokens.nonzero().flatten()
    base = ItemLosses(result.base.sums[index], result.tokens[index])
    return replace(result, base=base, sums=result.sums[:, index]), [items[i] for i in index.tolist()]
