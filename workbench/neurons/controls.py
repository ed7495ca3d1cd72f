"""Losses with neuron sets switched off, and controls: sets of equal size, random or matched by mean activation.

Source: Xiao et al. 2024, arXiv 2409.02877, sections 4.4 (functional pruning) and 4.5 (partition). Controls are this project's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import SetLosses, losses
from workbench.activations.sets import NeuronSet, set_of
from workbench.activations.sites import Progress, Site, scaling
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ControlKind: TypeAlias = Literal["random", "matched"]
WINDOW = 10
"""Number of nearest free ranks from which a matched neuron is drawn."""


@dataclass(frozen=True)
class Control:
    """A set that stands for the sets of some functions in a comparison.

    Attributes:
        kind: Random neurons, or random neurons matched by mean activation.
        functions: The functions whose sets have its size; one function for a matched set.
        neurons: The set.
    """

    kind: ControlKind
    functions: tuple[str, ...]
    neurons: NeuronSet


def ablate(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    sets: Sequence[NeuronSet],
    *,
    progress: Progress = lambda *_: None,
) -> SetLosses:
    """Compute the loss of every item with each set switched off, and with none. Weights are not changed.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The items' texts.
        sets: Neuron sets with different names; each costs one pass over the items.
        progress: Progress callback; it counts passes.

    Raises:
        WorkbenchError: If a set belongs to a model with other layers.
        ValueError: If two sets have the same name.
    """
    names = tuple(neurons.name for neurons in sets)
    if len(set(names)) < len(names):
        raise ValueError(f"expected sets with different names, found {names}")
    units = {site.layer: site.units for site in sites}
    for neurons in sets:
        neurons.check_model(units, None, f"set '{neurons.name}'")
    base = losses(model, rows)
    progress(1, 1 + len(sets))
    sums = []
    for number, neurons in enumerate(sets):
        with scaling(model, sites, neurons.indices):
            sums.append(losses(model, rows).sums)
        progress(number + 2, 1 + len(sets))
    return SetLosses(names, base, torch.stack(sums) if sums else base.sums.new_zeros(0, len(rows)))


def controls(
    sites: Sequence[Site], sets: Sequence[NeuronSet], means: Sequence[Tensor], *, draws: int = 1, seed: int = 0
) -> list[Control]:
    """Return sets of equal size for a comparison: random ones, shared by all functions of a size, and matched ones.

    Args:
        sites: The sites.
        sets: The functions' sets, named after the functions.
        means: Mean |activation| of every unit, per site [units].
        draws: Number of random and of matched sets.
        seed: Seed of the draws.

    Raises:
        WorkbenchError: If a set is so large that its layer has no other neurons to compare with.
    """
    same: dict[tuple[tuple[int, int], ...], list[NeuronSet]] = {}
    for neurons in sets:
        same.setdefault(_sizes(neurons), []).append(neurons)
    result: list[Control] = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed * 100_003 + draw)
        for number, group in enumerate(same.values()):
            name = f"random {draw}" if len(same) == 1 else f"random {draw} size {number}"
            functions = tuple(neurons.name for neurons in group)
            result.append(Control("random", functions, random_set(name, sites, group[0], generator)))
        for neurons in sets:
            matched = matched_set(f"matched {neurons.name} {draw}", sites, neurons, means, generator)
            result.append(Control("matched", (neurons.name,), matched))
    return result


def _sizes(neurons: NeuronSet) -> tuple[tuple[int, int], ...]:
    """Return (layer, number of the set's neurons) for each of its layers."""
    return tuple(sorted((layer, len(index)) for layer, index in neurons.indices.items()))


def random_set(
    name: str, sites: Sequence[Site], like: NeuronSet, generator: torch.Generator, *, without: bool = False
) -> NeuronSet:
    """Return random neurons, as many in every layer as another set has.

    Args:
        name: Name of the new set.
        sites: The sites.
        like: The set whose numbers of neurons are used.
        generator: Source of random numbers.
        without: Leave out the neurons of `like`. A layer with too few others gives fewer neurons.
    """
    chosen = []
    for site in sites:
        index = like.indices.get(site.layer, torch.empty(0, dtype=torch.long))
        order = torch.randperm(site.units, generator=generator)
        chosen.append((order[~torch.isin(order, index)] if without else order)[: len(index)])
    return set_of(name, sites, chosen, base=like.base, evidence={"control": "random"})


def matched_set(
    name: str, sites: Sequence[Site], like: NeuronSet, means: Sequence[Tensor], generator: torch.Generator
) -> NeuronSet:
    """Return random neurons with about the mean activations of another set, and none of its neurons.

    Each neuron is replaced by one of the neurons whose ranks by mean activation are nearest to its own.

    Args:
        name: Name of the new set.
        sites: The sites.
        like: The set to match.
        means: Mean |activation| of every unit, per site [units].
        generator: Source of random numbers.

    Raises:
        WorkbenchError: If a layer has fewer other neurons than the set has.
    """
    chosen = []
    totals = [0.0, 0.0]
    for site, mean in zip(sites, means, strict=True):
        index = like.indices.get(site.layer)
        if index is None:
            chosen.append(torch.empty(0, dtype=torch.long))
            continue
        if 2 * len(index) > site.units:
            raise WorkbenchError(
                f"set '{like.name}' has {len(index)} of the {site.units} {site.kind} of layer {site.layer}, so there is no other set "
                "of equal size to compare it with",
                "Choose a smaller share.",
            )
        other = _neighbors(index, mean, generator)
        totals = [totals[0] + float(mean[index].sum()), totals[1] + float(mean[other].sum())]
        chosen.append(other)
    evidence = {"control": "matched", "mean_activation": totals[1] / max(1, like.size), "set_mean": totals[0] / max(1, like.size)}
    return set_of(name, sites, chosen, base=like.base, evidence=evidence)


def _neighbors(index: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each unit another one of about the same rank by mean activation; all are different and none is in `index`."""
    order = mean.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    own = set(index.tolist())
    free = [r for r, unit in enumerate(order.tolist()) if unit not in own]
    chosen = []
    for unit in index[torch.randperm(len(index), generator=generator)].tolist():
        at = bisect_left(free, int(rank[unit]))
        near = sorted(range(max(0, at - WINDOW), min(len(free), at + WINDOW)), key=lambda i: abs(free[i] - int(rank[unit])))
        pick = near[int(torch.randint(min(WINDOW, len(near)), (), generator=generator))]
        chosen.append(int(order[free.pop(pick)]))
    return torch.tensor(chosen, dtype=torch.long)


def mean_overlap(sets: Sequence[NeuronSet]) -> tuple[float, float]:
    """Return the mean overlap |A ∩ B| / min(|A|, |B|) of two of some sets, and its mean for random sets of the same sizes by layer."""
    shares, chance = [], []
    for a in sets:
        for b in sets:
            if a is not b:
                expected = sum(len(a.indices[n]) * len(b.indices[n]) / a.units[n] for n in a.indices if n in b.indices)
                shares.append(a.overlap(b))
                chance.append(expected / max(1, min(a.size, b.size)))
    mean, expected_mean = (float(torch.tensor(values, dtype=torch.float64).mean()) for values in (shares, chance))
    return mean, expected_mean
