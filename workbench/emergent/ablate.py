"""What a model loses when neuron sets are switched off: losses of held-out items, controls of equal size, and overlaps.

Source: Xiao et al. 2024, arXiv 2409.02877, sections 4.4 (functional pruning) and 4.5 (partition). Controls are this project's: random
neurons, random neurons with the same mean activation, and the top set of a shuffled label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.emergent.activations import Progress
from workbench.emergent.labelled import ItemRow
from workbench.emergent.losses import Scored, SetLosses, losses
from workbench.emergent.sets import NeuronSet, set_of
from workbench.emergent.sites import Site, switching_off
from workbench.errors import WorkbenchError
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ControlKind: TypeAlias = Literal["random", "matched", "shuffled"]
WINDOW = 10
"""Number of nearest free ranks from which a matched neuron is drawn."""
_HIGHEST = 700.0  # largest exponent whose exponential is finite in float64


@dataclass(frozen=True)
class Control:
    """A set that stands for the sets of some functions in a comparison.

    Attributes:
        kind: Random neurons, random neurons matched by mean activation, or the top set of a shuffled label.
        functions: The functions whose sets have its size; one function for a matched set.
        draw: Number of the draw, from 0.
        neurons: The set.
    """

    kind: ControlKind
    functions: tuple[str, ...]
    draw: int
    neurons: NeuronSet


def ablate(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    sets: Sequence[NeuronSet],
    *,
    scored: Scored = "whole",
    progress: Progress = lambda *_: None,
) -> SetLosses:
    """Compute the loss of every item with each set switched off, and with none. Weights are not changed.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The items' texts.
        sets: Neuron sets with different names; each costs one pass over the items.
        scored: Tokens whose loss counts.
        progress: Progress callback; it counts passes.

    Raises:
        WorkbenchError: If a set belongs to a model with other layers.
        ValueError: If two sets have the same name.
    """

    def switch(number: int) -> Any:
        return switching_off(model, sites, sets[number].indices)

    return losses_with_each(model, sites, rows, sets, switch, scored=scored, progress=progress)


def losses_with_each(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    sets: Sequence[NeuronSet],
    switch: Callable[[int], Any],
    *,
    scored: Scored,
    progress: Progress,
) -> SetLosses:
    """Compute the loss of every item without a change, and with the change that belongs to each set; see `ablate`.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The items' texts.
        sets: Neuron sets with different names; each costs one pass over the items.
        switch: Number of a set -> a context in which its neurons are changed.
        scored: Tokens whose loss counts.
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
    base = losses(model, rows, scored=scored)
    progress(1, 1 + len(sets))
    sums = []
    for number in range(len(sets)):
        with switch(number):
            sums.append(losses(model, rows, scored=scored).sums)
        progress(number + 2, 1 + len(sets))
    return SetLosses(names, base, torch.stack(sums) if sums else base.sums.new_zeros(0, len(rows)), scored)


def loss_changes(result: SetLosses, functions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the rise of the mean loss per token of each function on each changed version, in nats [..., versions, functions].

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
    return changes


def perplexity_changes(result: SetLosses, functions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return (PPL_off − PPL) / PPL of each function on each changed version [..., versions, functions]; see `loss_changes`."""
    return loss_changes(result, functions, weights).clamp_max(_HIGHEST).expm1()


def controls(
    sites: Sequence[Site],
    sets: Sequence[NeuronSet],
    means: Sequence[Tensor],
    *,
    shuffled: Sequence[NeuronSet] = (),
    draws: int = 1,
    seed: int = 0,
) -> list[Control]:
    """Return sets of equal size for a comparison: random and shuffled ones, shared by all functions of a size, and matched ones.

    Args:
        sites: The sites.
        sets: The functions' sets, named after the functions.
        means: Mean |activation| of every unit, per site [units].
        shuffled: Top sets of shuffled labels.
        draws: Number of random and of matched sets.
        seed: Seed of the draws.

    Raises:
        WorkbenchError: If a set is so large that its layer has no other neurons to compare with.
        ValueError: If a shuffled set has, in some layer, another number of neurons than every function's set.
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
            result.append(Control("random", functions, draw, random_set(name, sites, group[0], generator)))
        for neurons in sets:
            matched = matched_set(f"matched {neurons.name} {draw}", sites, neurons, means, generator)
            result.append(Control("matched", (neurons.name,), draw, matched))
    for draw, neurons in enumerate(shuffled):
        if _sizes(neurons) not in same:
            raise ValueError(f"the shuffled set '{neurons.name}' has {neurons.size} neurons, like the set of no function")
        functions = tuple(other.name for other in same[_sizes(neurons)])
        result.append(Control("shuffled", functions, draw, replace(neurons, name=f"shuffled {draw}")))
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
    name: str,
    sites: Sequence[Site],
    like: NeuronSet,
    means: Sequence[Tensor],
    generator: torch.Generator,
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


@dataclass(frozen=True)
class Overlaps:
    """Overlaps of sets with each other.

    Attributes:
        names: The sets.
        shares: |A ∩ B| / min(|A|, |B|) [sets, sets].
        chance: Its mean for random sets with the same number of neurons in every layer [sets, sets].
        by_layer: Mean over layers of the overlap in the layer, as in the paper's ancestor code [sets, sets].
    """

    names: tuple[str, ...]
    shares: Tensor
    chance: Tensor
    by_layer: Tensor


def overlaps(sets: Sequence[NeuronSet]) -> Overlaps:
    """Return the overlaps of all pairs of sets of one model."""
    size = len(sets)
    shares, chance, by_layer = (torch.ones(size, size, dtype=torch.float64) for _ in range(3))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            common = {layer: int(torch.isin(a.indices[layer], b.indices[layer]).sum()) for layer in _shared(a, b)}
            expected = sum(len(a.indices[n]) * len(b.indices[n]) / a.units[n] for n in common)
            smaller = max(1, min(a.size, b.size))
            shares[i, j], chance[i, j] = a.overlap(b), expected / smaller
            ratios = [count / min(len(a.indices[n]), len(b.indices[n])) for n, count in common.items()]
            by_layer[i, j] = sum(ratios) / len(ratios) if ratios else 0.0
    return Overlaps(tuple(neurons.name for neurons in sets), shares, chance, by_layer)


def _shared(a: NeuronSet, b: NeuronSet) -> Iterator[int]:
    return (layer for layer in a.indices if layer in b.indices)
