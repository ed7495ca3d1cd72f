"""Measure what every function loses when the neurons of one function, or those of a control, are switched off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.activations.labelled import Item, Labelled
from workbench.activations.losses import SetLosses, losses
from workbench.activations.sets import NeuronSet
from workbench.activations.sites import scaling
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import JsonObject, Number
from workbench.neurons.controls import ablate, controls, matched_set, mean_overlap
from workbench.neurons.damage import DamageTable, ItemGroups, damage_table
from workbench.neurons.subject import NeuronSubject, some_of_each_task

if TYPE_CHECKING:
    from torch import Tensor

ITEMS = 3
"""Held-out items of each task whose loss is measured. With two, the intervals over tasks were a third wider."""
MATCHED = 5
"""Random sets of equal activation that a function's own loss is compared with. One alone may hold a neuron on which everything depends."""
FLIPPED, WRITTEN = 3, 8
"""Items of a function that are shown with and without its set, and tokens of their continuations."""


class FlippedItem(JsonObject):
    """A held-out item, continued with and without a function's set."""

    prompt: str
    """The prompt."""
    response: str
    """The right continuation."""
    rise: Number
    """Rise of the item's loss without the set, in nats per token."""
    with_set: str
    """Greedy continuation by the model."""
    without: str
    """Greedy continuation without the set."""


class SetOverlap(JsonObject):
    """Overlap of two functions' sets."""

    mean: Number
    """Mean over pairs of functions."""
    chance: Number
    """Its value for random sets."""


class Ablation(DamageTable):
    """Damage by the functions' sets on tasks that did not choose them, beside controls of equal size."""

    share: Number
    """Share of the neurons in a set."""
    overlap: SetOverlap
    """Mean overlap of two sets, and its value by chance."""


def judged_items(texts: Labelled) -> list[Item]:
    """Return the held-out items whose losses are measured.

    Raises:
        WorkbenchError: If a function has none.
    """
    items = some_of_each_task(texts.in_split("heldout"), ITEMS)
    ItemGroups.of(items, texts.functions)
    return items


def ablate_functions(
    subject: NeuronSubject, items: Sequence[Item], sets: Mapping[str, NeuronSet], means: Sequence[Tensor], seed: int = 0
) -> tuple[Ablation, SetLosses]:
    """Switch off each function's set and its controls, and measure the losses of all functions' items.

    Args:
        subject: The model.
        items: Items of tasks that did not choose the sets.
        sets: Function -> its set.
        means: Mean |activation| of every unit, per site [units].
        seed: Seed of the controls.

    Returns:
        The damage, and the losses of the items with each of the functions' sets switched off.
    """
    compared = controls(subject.sites, list(sets.values()), means, seed=seed)
    lost = ablate(
        subject.model,
        subject.sites,
        subject.rows(items),
        [*sets.values(), *(control.neurons for control in compared)],
        progress=lambda done, total: subject.tell(done, total, "ablations"),
    )
    mean, chance = mean_overlap(list(sets.values()))
    share = sum(neurons.share for neurons in sets.values()) / len(sets)
    table = damage_table(lost, items, list(sets), compared)
    return Ablation(**dict(table), share=share, overlap=SetOverlap(mean=mean, chance=chance)), lost


def matched_changes(
    subject: NeuronSubject,
    items: Sequence[Item],
    sets: Mapping[str, NeuronSet],
    means: Sequence[Tensor],
    measured: tuple[Ablation, SetLosses],
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return how a function's own perplexity changes without random neurons of its set's mean activation, for MATCHED draws.

    The first draw is the control of the damage matrix. The others are measured on the function's own items alone.

    Args:
        subject: The model.
        items: Items of tasks that did not choose the sets.
        sets: Function -> its set.
        means: Mean |activation| of every unit, per site [units].
        measured: The damage and the losses of the same items.
        seed: Seed of the draws.
    """
    ablation, lost = measured
    first, found = ablation.controls["matched"].changes, {}
    for number, (name, neurons) in enumerate(sets.items()):
        own = [i for i, item in enumerate(items) if item.function == name]
        rows, before, tokens = subject.rows([items[i] for i in own]), lost.base.sums[own].sum(), lost.tokens[own].sum()
        changes = [math.inf if first[number][number] is None else float(first[number][number] or 0)]
        generator = torch.Generator().manual_seed(seed * 100_003 + number + 1)
        for draw in range(1, MATCHED):
            drawn = matched_set(f"{name} {draw}", subject.sites, neurons, means, generator)
            with scaling(subject.model, subject.sites, drawn.indices):
                after = losses(subject.model, rows).sums.sum()
            changes.append(float(((after - before) / tokens).expm1()))
        found[name] = changes
        subject.tell(number + 1, len(sets), "random neurons of equal activation")
    return found


def flipped_items(
    subject: NeuronSubject, items: Sequence[Item], sets: Mapping[str, NeuronSet], lost: SetLosses
) -> dict[str, list[FlippedItem]]:
    """Return, for each function, the own items whose loss rises most without its set, with continuations of both models.

    Args:
        subject: The model.
        items: The items.
        sets: Function -> its set.
        lost: Losses of the items with each set switched off.
    """
    tokens = lost.tokens.clamp_min(1)
    found = {}
    for name, neurons in sets.items():
        rise = (lost.sums[lost.names.index(name)] - lost.base.sums) / tokens
        own = [i for i, item in enumerate(items) if item.function == name]
        worst = sorted(own, key=lambda i: -float(rise[i]))[:FLIPPED]
        prompts = [row.read("prompt") for row in subject.rows([items[i] for i in worst])]
        before = _continued(subject, prompts)
        with scaling(subject.model, subject.sites, neurons.indices):
            after = _continued(subject, prompts)
        found[name] = [
            FlippedItem(prompt=items[i].prompt, response=items[i].response, rise=float(rise[i]), with_set=a, without=b)
            for i, a, b in zip(worst, before, after, strict=True)
        ]
    return found


@no_grad
def _continued(subject: NeuronSubject, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Continue prompts greedily, each alone: padding would change what some architectures compute."""
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=subject.model.device)
        made = subject.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0
        )
        texts.append(subject.tokenizer.decode(made[0, len(prompt) :].tolist()))
    return texts
