"""Damage matrices with intervals: what each function loses when the neurons, or the brick, of a function are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.emergent.ablate import Control, ablate, loss_changes, perplexity_changes
from workbench.emergent.activations import Progress
from workbench.emergent.decompose import coupling, dominant_rows, double_centered, row_couplings
from workbench.emergent.labelled import Item, ItemRow
from workbench.emergent.losses import ItemLosses, SetLosses
from workbench.emergent.sets import NeuronSet
from workbench.emergent.sites import Site
from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.library.neurons_draws import ItemGroups

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Damage:
    """A damage matrix with its summary.

    Attributes:
        functions: Names of rows and columns. Row f holds what every function loses when that of f is removed.
        changes: The damage, such as (PPL_off − PPL) / PPL [functions, functions].
        low: Lower ends of 95 % intervals [functions, functions].
        high: Upper ends [functions, functions].
        dominant: True for each row whose diagonal exceeds all its other entries [functions].
        dominance: Share of the resamplings in which it does [functions].
        coupling: Median over rows of mean off-diagonal / diagonal; infinite if half of the diagonals are not positive.
        interval: Interval of the coupling.
        couplings: Mean off-diagonal / diagonal of each row [functions].
        draws: The damage under resampled clusters [reps, functions, functions].
    """

    functions: tuple[str, ...]
    changes: Tensor
    low: Tensor
    high: Tensor
    dominant: Tensor
    dominance: Tensor
    coupling: float
    interval: tuple[float, float]
    couplings: Tensor
    draws: Tensor

    def document(self) -> dict[str, Any]:
        """Return the matrix as plain data; infinite numbers are None."""
        return {
            "functions": list(self.functions),
            "changes": finite(self.changes),
            "low": finite(self.low),
            "high": finite(self.high),
            "dominant": self.dominant.tolist(),
            "dominance": self.dominance.tolist(),
            "dominant_rows": int(self.dominant.sum()),
            "coupling": finite(torch.tensor(self.coupling)),
            "interval": finite(torch.tensor(self.interval)),
            "couplings": finite(self.couplings),
        }


def finite(values: Tensor) -> Any:
    """Return a tensor as nested lists for JSON, with None for infinite numbers and NaN."""
    if values.dim():
        return [finite(row) for row in values]
    return float(values) if bool(torch.isfinite(values)) else None


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
    bounds = groups.interval(coupling(draws))
    return Damage(
        tuple(functions),
        changes,
        low,
        high,
        dominant_rows(changes),
        dominant_rows(draws).double().mean(0),
        float(coupling(changes)),
        (float(bounds[0]), float(bounds[1])),
        row_couplings(changes),
        draws,
    )


@dataclass(frozen=True)
class ControlTable:
    """Damage by the control sets of one kind, and its comparison with the functions' own sets.

    Attributes:
        kind: "random", "matched" or "shuffled".
        damage: Damage matrix whose row f is the control of f: a mean over draws.
        exceeds: Share of the resamplings in which the set of f harms f more than its control does [functions].
    """

    kind: str
    damage: Damage
    exceeds: Tensor

    def document(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {"kind": self.kind, **self.damage.document(), "exceeds": self.exceeds.tolist()}


@dataclass(frozen=True)
class AblationTable:
    """The functional pruning of a model: damage by functions' neuron sets and by controls of equal size.

    Attributes:
        damage: Relative change of perplexity when the set of the row's function is switched off.
        centered: Rise of the loss in nats without the means of rows and columns [functions, functions].
        centered_dominant: True for each row whose diagonal exceeds all other entries of `centered` [functions].
        base: Perplexity of each function on the unchanged model [functions].
        controls: Kind of control -> its table.
        items: Number of items with predicted tokens.
        clusters: Number of clusters of each function.
        warnings: Sentences about what the intervals cannot show.
    """

    damage: Damage
    centered: Tensor
    centered_dominant: Tensor
    base: Tensor
    controls: Mapping[str, ControlTable]
    items: int
    clusters: tuple[int, ...]
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {
            **self.damage.document(),
            "centered": self.centered.tolist(),
            "centered_dominant": self.centered_dominant.tolist(),
            "base_perplexity": finite(self.base),
            "controls": {kind: table.document() for kind, table in self.controls.items()},
            "items": self.items,
            "clusters": list(self.clusters),
            "warnings": list(self.warnings),
        }


def ablation(
    model: PreTrainedModel,
    sites: Sequence[Site],
    items: Sequence[Item],
    rows: Sequence[ItemRow],
    sets: Sequence[NeuronSet],
    controls: Sequence[Control] = (),
    progress: Progress = lambda *_: None,
) -> AblationTable:
    """Switch off the set of every function and every control, and return what each function loses.

    Args:
        model: The live model.
        sites: Its sites.
        items: Held-out items, with their functions and tasks.
        rows: Their tokens, in the same order.
        sets: One set per function of the items, named after it.
        controls: Sets of equal size; see `workbench.emergent.ablate.controls`.
        progress: Progress callback; it counts passes over the items.

    Raises:
        WorkbenchError: If a set has no items of its function, or belongs to another model.
    """
    ItemGroups.of(items, [neurons.name for neurons in sets])  # raises before the passes
    result = ablate(model, sites, rows, [*sets, *(control.neurons for control in controls)], progress=progress)
    return ablation_table(result, items, [neurons.name for neurons in sets], controls)


def ablation_table(
    result: SetLosses, items: Sequence[Item], functions: Sequence[str], controls: Sequence[Control] = ()
) -> AblationTable:
    """Return the table of stored or computed losses.

    Args:
        result: Losses with each set switched off; its names include the functions and the controls' sets.
        items: The items.
        functions: The functions, in the order of rows and columns.
        controls: The controls.

    Raises:
        WorkbenchError: If a function has no item with a predicted token.
    """
    check_tokens(result, ItemGroups.of(items, functions))
    result, items = _counted(result, items)
    groups = ItemGroups.of(items, functions)
    weights = groups.weights()
    of_set = {name: number for number, name in enumerate(result.names)}
    changes, draws = (perplexity_changes(result, groups.columns, w) for w in (None, weights))
    rows = [of_set[name] for name in functions]
    damage = damage_of(functions, changes[rows], draws[:, rows], groups)
    tables: dict[str, ControlTable] = {}
    for kind in dict.fromkeys(control.kind for control in controls):
        members = [[of_set[c.neurons.name] for c in controls if c.kind == kind and name in c.functions] for name in functions]
        if lacking := [name for name, of in zip(functions, members, strict=True) if not of]:
            raise WorkbenchError(f"function '{lacking[0]}' has no {kind} control of its size", "Make controls for all sets.")
        table = damage_of(
            functions,
            torch.stack([changes[of].mean(0) for of in members]),
            torch.stack([draws[:, of].mean(1) for of in members], 1),
            groups,
        )
        exceeds = damage.draws.diagonal(dim1=1, dim2=2) > table.draws.diagonal(dim1=1, dim2=2)
        tables[kind] = ControlTable(kind, table, exceeds.double().mean(0))
    centered = double_centered(loss_changes(result, groups.columns)[rows])
    base = _perplexities(result, groups)
    clusters = tuple(groups.clusters(number) for number in range(len(functions)))
    return AblationTable(damage, centered, dominant_rows(centered), base, tables, len(items), clusters, groups.warnings)


def check_tokens(result: SetLosses, groups: ItemGroups) -> None:
    """Check that every function has a predicted token.

    Raises:
        WorkbenchError: If one has none.
    """
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


def _perplexities(result: SetLosses, groups: ItemGroups) -> Tensor:
    sums, tokens = (
        torch.zeros(len(groups.functions), dtype=torch.float64).index_add_(0, groups.columns, values.double())
        for values in (result.base.sums, result.tokens)
    )
    return (sums / tokens).clamp_max(700.0).exp()
