"""Facts with their knowledge neurons, and the proof: suppressing or amplifying the neurons changes the fact, but not other facts.

Changes of probability are compared with those that equally many random neurons of the same layers cause.

Source: Dai et al. 2022, Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from workbench.activations.labelled import folder_name
from workbench.activations.sets import NeuronSet, set_of
from workbench.activations.sites import Progress, Site
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number
from workbench.neurons.attribution import Answer, Attribution, FactPrompt, answer_probabilities, attribute
from workbench.neurons.controls import random_set

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SETS = "knowledge/facts"
"""Folder of the sets of single facts, below the results."""
THRESHOLD = 0.2
"""A wording keeps the neurons with an attribution above this share of its largest one."""
SHARE = 0.7
"""Share of a fact's wordings that must keep a neuron."""
DRAWS = 3
"""Random sets that each fact's neurons are compared with."""
FACTORS = {"suppressed": 0.0, "amplified": 2.0}


class LocateSettings(JsonObject):
    """Settings of the attributions."""

    answer: Answer = "target"
    """Answer of a fact that is attributed."""
    steps: int = 20
    """Number of scales of the integral."""
    count: int = 10
    """Largest number of facts, from the start of the file."""


class ProbabilityChange(JsonObject):
    """Relative changes of probability when a fact's neurons are suppressed or amplified."""

    own: Number
    """Change of the fact's answer: (P after - P before) / P before."""
    random: Number
    """The same for equally many random neurons of the same layers, as a mean over draws."""
    others: Number | None
    """Change of the answers of the other facts; null if there are none."""
    drawn: list[Number]
    """Change of the fact's answer by each random draw."""


class LocatedNeuron(JsonObject):
    """A neuron, or an expert, that carries a fact."""

    layer: int
    """Its layer."""
    neuron: int
    """Its index in the layer."""
    score: Number
    """Mean attribution over the fact's wordings."""


class LocatedFact(JsonObject):
    """A fact with the neurons that carry it."""

    fact: str
    """Id of the fact."""
    prompt: str
    """Its prompt."""
    answer: str
    """The attributed answer."""
    probability: Number
    """Mean probability of the answer over the fact's wordings."""
    error: Number
    """Largest relative error of the sums of attributions over wordings; 0 if they add up to the change of probability."""
    neurons: list[LocatedNeuron]
    """Its neurons, those with the largest attributions first."""
    layers: dict[str, Number]
    """Layer -> its share of the positive attributions."""
    changes: dict[str, ProbabilityChange]
    """suppressed, amplified -> changes of probability; empty if the fact has no neurons."""
    set: str | None
    """Directory of the set of its neurons, relative to the results; null if it has none."""


def locate_facts(
    model: PreTrainedModel,
    sites: Sequence[Site],
    facts: Sequence[Sequence[FactPrompt]],
    texts: Sequence[tuple[str, str]],
    settings: LocateSettings | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> tuple[list[LocatedFact], dict[str, NeuronSet]]:
    """Find the knowledge neurons of facts, and measure what suppressing and amplifying them does.

    Args:
        model: The live model, best in float32.
        sites: Its sites.
        facts: Wordings of each fact; see `fact_prompts`.
        texts: Prompt and attributed answer of each fact.
        settings: Settings.
        progress: Progress callback; it counts facts.

    Returns:
        The facts, and the sets of their neurons by the fact's id, for facts that have some.
    """
    settings = settings or LocateSettings()
    located: list[LocatedFact] = []
    sets: dict[str, NeuronSet] = {}
    folders: set[str] = set()
    everyone = [prompts[0] for prompts in facts]
    before = answer_probabilities(model, sites, everyone, {})
    for number, prompts in enumerate(facts):
        attributions = [attribute(model, sites, prompt, steps=settings.steps) for prompt in prompts]
        name = prompts[0].fact
        neurons = knowledge_neurons(name, sites, attributions, share=SHARE)
        others = [i for i, prompt in enumerate(everyone) if prompt.fact != name]
        changes, folder = {}, None
        if neurons.size:
            sets[name], folder = neurons, _free(f"{SETS}/{folder_name(name)}", folders)
            rest = [everyone[i] for i in others], before[others]
            own = prompts, answer_probabilities(model, sites, prompts, {})
            changes = {kind: _change(model, sites, neurons, own, rest, factor) for kind, factor in FACTORS.items()}
        row = LocatedFact(
            fact=name,
            prompt=texts[number][0],
            answer=texts[number][1],
            probability=sum(a.clean for a in attributions) / len(attributions),
            error=max(a.error for a in attributions),
            neurons=_listed(neurons),
            layers={str(layer): share for layer, share in layer_shares(sites, attributions).items()},
            changes=changes,
            set=folder,
        )
        located.append(row)
        progress(number + 1, len(facts))
    return located, sets


def _free(folder: str, taken: set[str]) -> str:
    """Return a folder's name, with a number behind it if it is taken, and take it."""
    name, number = folder, 1
    while name in taken:
        number += 1
        name = f"{folder}-{number}"
    taken.add(name)
    return name


def _listed(neurons: NeuronSet) -> list[LocatedNeuron]:
    """Return the neurons of a set, those with the largest scores first."""
    found = [
        LocatedNeuron(layer=layer, neuron=int(unit), score=float(score))
        for layer, index in neurons.indices.items()
        for unit, score in zip(index, neurons.scores[layer], strict=True)
    ]
    return sorted(found, key=lambda neuron: -neuron.score)


def knowledge_neurons(
    name: str, sites: Sequence[Site], attributions: Sequence[Attribution], *, share: float = SHARE
) -> NeuronSet:
    """Return the neurons that carry a fact in enough of its wordings.

    Args:
        name: Name of the set.
        sites: The sites.
        attributions: Attributions of the fact's prompt and of its paraphrases.
        share: Share of the wordings that must keep a neuron; 1 intersects all of them.

    Returns:
        The set, with mean attributions as scores. It is empty if no neuron is kept often enough.
    """
    needed = max(1, math.ceil(share * len(attributions) - 1e-9))
    largest = [max(float(scores.max()) for scores in a.scores) for a in attributions]
    chosen, means = [], []
    for number in range(len(sites)):
        scores = torch.stack([a.scores[number] for a in attributions])
        bars = torch.tensor([THRESHOLD * top if top > 0 else math.inf for top in largest], dtype=scores.dtype)
        chosen.append(((scores > bars[:, None]).sum(0) >= needed).nonzero().flatten())
        means.append(scores.mean(0))
    evidence = {"threshold": THRESHOLD, "share": share, "wordings": len(attributions)}
    return set_of(name, sites, chosen, means, evidence=evidence)


def _change(
    model: PreTrainedModel,
    sites: Sequence[Site],
    neurons: NeuronSet,
    of_fact: tuple[Sequence[FactPrompt], Tensor],
    rest: tuple[Sequence[FactPrompt], Tensor],
    factor: float,
) -> ProbabilityChange:
    """Measure what a factor of a fact's neurons changes, from wordings of the fact and of others with their clean probabilities."""

    def changed(units: NeuronSet, prompts: Sequence[FactPrompt], clean: Tensor) -> float:
        after = answer_probabilities(model, sites, prompts, units.indices, factor)
        return float(after.double().sum() / clean.double().sum()) - 1

    own = changed(neurons, *of_fact)
    generator = torch.Generator().manual_seed(0)
    controls = [random_set(f"random {draw}", sites, neurons, generator, without=True) for draw in range(DRAWS)]
    drawn = [changed(control, *of_fact) for control in controls]
    others = changed(neurons, *rest) if rest[0] else None
    return ProbabilityChange(own=own, random=sum(drawn) / max(1, len(drawn)), others=others, drawn=drawn)


def union_of(name: str, sets: Iterable[NeuronSet], sites: Sequence[Site]) -> NeuronSet:
    """Return the set of the neurons that are in at least one of some sets, with their largest scores."""
    scores = [torch.full((site.units,), -math.inf) for site in sites]
    for neurons in sets:
        for number, site in enumerate(sites):
            if (index := neurons.indices.get(site.layer)) is not None:
                scores[number][index] = torch.maximum(scores[number][index], neurons.scores[site.layer].float())
    return set_of(name, sites, [(s > -math.inf).nonzero().flatten() for s in scores], scores)


def layer_shares(sites: Sequence[Site], attributions: Sequence[Attribution]) -> dict[int, float]:
    """Return each layer's share of the positive attributions, as a mean over wordings; 0 everywhere if none is positive."""
    mass = torch.tensor([[float(scores.clamp_min(0).sum()) for scores in a.scores] for a in attributions], dtype=torch.float64)
    shares = (mass / mass.sum(1, keepdim=True).clamp_min(1e-300)).mean(0)
    return {site.layer: float(share) for site, share in zip(sites, shares, strict=True)}
