"""Facts with their knowledge neurons, and the proof: suppressing or amplifying the neurons changes the fact, but not other facts.

Changes of probability are compared with those that equally many random neurons of the same layers cause.

Source: Dai et al. 2022, Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from workbench.emergent.ablate import random_set
from workbench.emergent.activations import Progress
from workbench.emergent.answers import FactPrompt
from workbench.emergent.locate import (
    Answer,
    At,
    Attribution,
    Rule,
    answer_probabilities,
    attribute,
    knowledge_neurons,
)
from workbench.emergent.sets import NeuronSet, set_of
from workbench.emergent.sites import Site
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FACTORS = {"suppressed": 0.0, "amplified": 2.0}


@dataclass(frozen=True)
class LocateSettings:
    """Settings of `locate_facts`.

    Attributes:
        answer: Answer of a fact that is attributed.
        steps: Number of scales of the integral.
        at: Tokens whose activations are scaled, and later suppressed and amplified.
        rule: Scales of the integral.
        threshold: A wording keeps neurons with an attribution above this share of its largest one.
        share: Share of the wordings that must keep a neuron.
        draws: Number of random sets that each fact's neurons are compared with.
        seed: Seed of the random sets.
        count: Largest number of facts, from the start of the file.
    """

    answer: Answer = "target"
    steps: int = 20
    at: At = "last"
    rule: Rule = "midpoint"
    threshold: float = 0.2
    share: float = 0.7
    draws: int = 3
    seed: int = 0
    count: int = 10


@dataclass(frozen=True)
class Change:
    """Relative changes of probability, (P' − P) / P with sums over prompts, when neurons are multiplied by a factor.

    Attributes:
        own: Change of the fact's answer, over its wordings.
        random: The same for random neurons, as a mean over draws.
        others: Change of the answers of the other facts; None if there are none.
        drawn: Change of the fact's answer by each random draw.
    """

    own: float
    random: float
    others: float | None
    drawn: tuple[float, ...] = ()


@dataclass(frozen=True)
class LocatedFact:
    """A fact with the neurons that carry it.

    Attributes:
        fact: Id of the fact.
        neurons: The neurons; the set is empty if no neuron is kept by enough wordings.
        probability: Mean probability of the answer over wordings.
        error: Largest relative error of the sums of attributions, over wordings; see `Attribution.error`.
        layers: Layer -> its share of the positive attributions, as a mean over wordings.
        changes: "suppressed" and "amplified" -> changes of probability; empty if the set is.
    """

    fact: str
    neurons: NeuronSet
    probability: float
    error: float
    layers: Mapping[int, float]
    changes: Mapping[str, Change]

    def document(self) -> dict[str, Any]:
        """Return the fact as plain data."""
        neurons = [
            {"layer": layer, "neuron": int(unit), "score": float(score)}
            for layer, index in self.neurons.indices.items()
            for unit, score in zip(index, self.neurons.scores[layer], strict=True)
        ]
        return {
            "fact": self.fact,
            "probability": self.probability,
            "error": self.error,
            "neurons": sorted(neurons, key=lambda neuron: -neuron["score"]),
            "layers": {str(layer): share for layer, share in self.layers.items()},
            "changes": {kind: {**asdict(change), "drawn": list(change.drawn)} for kind, change in self.changes.items()},
        }


def locate_facts(
    model: PreTrainedModel,
    sites: Sequence[Site],
    facts: Sequence[Sequence[FactPrompt]],
    settings: LocateSettings | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> list[LocatedFact]:
    """Find the knowledge neurons of facts, and measure what suppressing and amplifying them does.

    Args:
        model: The live model, best in float32.
        sites: Its sites.
        facts: Wordings of each fact; see `fact_prompts`.
        settings: Settings.
        progress: Progress callback; it counts facts.
    """
    settings = settings or LocateSettings()
    located: list[LocatedFact] = []
    everyone = [prompts[0] for prompts in facts]
    before = answer_probabilities(model, sites, everyone, {}, at=settings.at)
    for number, prompts in enumerate(facts):
        attributions = [
            attribute(model, sites, prompt, steps=settings.steps, at=settings.at, rule=settings.rule) for prompt in prompts
        ]
        name = prompts[0].fact
        neurons = knowledge_neurons(name, sites, attributions, threshold=settings.threshold, share=settings.share)
        others = [i for i, prompt in enumerate(everyone) if prompt.fact != name]
        changes = {}
        if neurons.size:
            rest = [everyone[i] for i in others], before[others]
            own = prompts, answer_probabilities(model, sites, prompts, {}, at=settings.at)
            changes = {kind: _change(model, sites, neurons, own, rest, factor, settings) for kind, factor in FACTORS.items()}
        clean = sum(a.clean for a in attributions) / len(attributions)
        error = max(a.error for a in attributions)
        located.append(LocatedFact(name, neurons, clean, error, layer_shares(sites, attributions), changes))
        progress(number + 1, len(facts))
    return located


def _change(
    model: PreTrainedModel,
    sites: Sequence[Site],
    neurons: NeuronSet,
    of_fact: tuple[Sequence[FactPrompt], Tensor],
    rest: tuple[Sequence[FactPrompt], Tensor],
    factor: float,
    settings: LocateSettings,
) -> Change:
    """Measure the changes of probability that multiplying a fact's neurons causes.

    Args:
        model: The live model.
        sites: Its sites.
        neurons: The fact's neurons.
        of_fact: Wordings of the fact, and the probabilities of its answer on the unchanged model.
        rest: Wordings of other facts, and the same probabilities.
        factor: Factor of the activations.
        settings: Settings.
    """
    at = settings.at
    prompts, clean = of_fact
    own = answer_probabilities(model, sites, prompts, neurons.indices, factor, at=at)
    generator = torch.Generator().manual_seed(settings.seed)
    controls = [random_set(f"random {draw}", sites, neurons, generator, without=True) for draw in range(settings.draws)]
    drawn = [_relative(answer_probabilities(model, sites, prompts, c.indices, factor, at=at), clean) for c in controls]
    others = None
    if rest[0]:
        others = _relative(answer_probabilities(model, sites, rest[0], neurons.indices, factor, at=at), rest[1])
    return Change(_relative(own, clean), sum(drawn) / max(1, len(drawn)), others, tuple(drawn))


def _relative(after: Tensor, before: Tensor) -> float:
    return float(after.double().sum() / before.double().sum()) - 1


def union_of(name: str, facts: Sequence[LocatedFact], sites: Sequence[Site], **rest: Any) -> NeuronSet:
    """Return the set of the neurons that carry at least one of some facts, with their largest scores.

    Args:
        name: Name of the set.
        facts: The facts.
        sites: The sites.
        **rest: Other fields of the set.
    """
    scores = [torch.full((site.units,), -math.inf) for site in sites]
    for fact in facts:
        for number, site in enumerate(sites):
            if (index := fact.neurons.indices.get(site.layer)) is not None:
                own = fact.neurons.scores[site.layer].float()
                scores[number][index] = torch.maximum(scores[number][index], own)
    return set_of(name, sites, [(s > -math.inf).nonzero().flatten() for s in scores], scores, **rest)


def layer_shares(sites: Sequence[Site], attributions: Sequence[Attribution]) -> dict[int, float]:
    """Return each layer's share of the positive attributions, as a mean over wordings; 0 everywhere if none is positive."""
    mass = torch.tensor([[float(scores.clamp_min(0).sum()) for scores in a.scores] for a in attributions], dtype=torch.float64)
    shares = (mass / mass.sum(1, keepdim=True).clamp_min(1e-300)).mean(0)
    return {site.layer: float(share) for site, share in zip(sites, shares, strict=True)}
