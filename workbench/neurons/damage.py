"""Damage matrices with intervals: what each function loses when the neurons, or the brick, of a function are removed.

Rows are removed sets or bricks, columns are functions, and row i serves function i.

Source: the questions of Xiao et al. 2024, arXiv 2409.02877, section 5.3, which gives no formulas; the definitions are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from workbench.activations.labelled import Item
from workbench.activations.losses import ItemLosses, SetLosses
from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.neurons.controls import Control
from workbench.neurons.draws import ItemGroups
from workbench.results import Measured, Number, Part

if TYPE_CHECKING:
    from torch import Tensor

_HIGHEST = 700.0  # largest exponent whose exponential is finite in float64


class Damage(Part):
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
        what = "no responses" if result.scored == "response" else "no item with two or more tokens"
        raise WorkbenchError(
            f"function '{bad[0]}' has {what}, so that its loss cannot be computed", "Add texts of this function."
        )


def _counted(result: SetLosses, items: Sequence[Item]) -> tuple[SetLosses, list[Item]]:
    """Return the items with predicted tokens. A task without any would leave a function without tokens in some resamplings."""
    index = result.tokens.nonzero().flatten()
    base = ItemLosses(result.base.sums[index], result.tokens[index])
    return replace(result, base=base, sums=result.sums[:, index]), [items[i] for i in index.tolist()]
