"""Bricks that are sets of the base's own neurons: a card beside the set's files, and checks against a base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.activations.sets import RECORD, NeuronSet, read_set, set_masks, write_set
from workbench.bricks.card import Axes, BaseRecord, BrickCard, axes_of, read_card, write_card
from workbench.ground.errors import GateFailedError, WorkbenchError
from workbench.ground.foreign_names import CARD
from workbench.ground.results import JsonObject, Number
from workbench.models.layout import Model

MADE_BY = "workbench analyze"
BEST = 3
"""Number of neurons with the best scores that a layer shows."""


class BestNeuron(JsonObject):
    """A neuron with a high score."""

    neuron: int
    """Index of the neuron in its layer."""
    score: Number
    """Its score."""


class LayerNeurons(JsonObject):
    """The neurons of a set in one layer."""

    size: int
    """Number of neurons of the set."""
    of: int
    """Number of neurons of the layer."""
    best: list[BestNeuron]
    """Neurons with the highest scores; empty if the set has no scores."""


class ShownNeurons(JsonObject):
    """A set of neurons."""

    name: str
    """Name of the set."""
    kind: str
    """neurons or experts."""
    size: int
    """Number of neurons."""
    share: Number
    """Share of the model's neurons that are in the set."""
    base: str | None
    """Digest of the model that the set was chosen on."""
    digest: str
    """Digest of the set."""
    layers: dict[str, LayerNeurons]
    """Layer -> the set's neurons."""
    evidence: dict[str, object]
    """How the set was chosen and what it does."""


def write_neuron_brick(
    folder: Path, neurons: NeuronSet, base: BaseRecord, skill: str = "", *, made_by: str = MADE_BY, **fields: Any
) -> BrickCard:
    """Write a set of neurons as a brick: neurons.json, neurons.safetensors and brick.yaml."""
    digest = base.digest or neurons.base
    write_set(folder, replace(neurons, base=neurons.base or digest))
    card = BrickCard(
        version=1,
        kind="neurons",
        skill=skill or f"{neurons.size:,} {neurons.kind} for {neurons.name} ({100 * neurons.share:.3g} %)",
        base=base.model_copy(update={"digest": digest}),
        digest=neurons.digest(),
        **{"name": folder.name, "functions": (neurons.name,), **fields},
    )
    write_card(folder, card, made_by=made_by, record=RECORD)
    return card


def neuron_brick(folder: Path) -> tuple[NeuronSet, BrickCard | None]:
    """Read a set of neurons and its card, if it has one.

    Raises:
        WorkbenchError: If a file is damaged, the card is of another kind, or its digest is not the set's.
    """
    neurons = read_set(folder, folder.name)
    if not (folder / CARD).is_file():
        return neurons, None
    card = read_card(folder)
    if card.kind != "neurons":
        raise WorkbenchError(
            f"{folder.name}: {CARD} says kind: {card.kind}, but the directory holds a set of neurons ({RECORD})",
            "Write kind: neurons.",
        )
    if card.digest and card.digest != neurons.digest():
        raise GateFailedError(
            f"{folder.name}: digest {neurons.digest()}, but its card says {card.digest}", f"Make it again: {MADE_BY}."
        )
    return neurons, card


def neuron_axes_of(neurons: NeuronSet, card: BrickCard | None) -> dict[str, str]:
    """Return axis -> value of a set of neurons."""
    return axes_of("neurons", card.axes if card else Axes(), experts=neurons.kind == "experts")


def check_base(neurons: NeuronSet, card: BrickCard | None, base: Model, digest: str | None, label: str) -> int:
    """Check a set against a base, and return the number of tensors with rows or columns of its neurons.

    Args:
        neurons: The set.
        card: Its card, whose base may list other digests of the same weights.
        base: The base.
        digest: Digest of the base; None skips the comparison.
        label: Start of error messages.

    Raises:
        WorkbenchError: If the base has other layers, other numbers of neurons or other weights.
    """
    masks = set_masks(neurons, base, label, None if card and digest in card.base.aliases else digest)
    return sum(not mask.empty for mask in masks.values())


def shown_neurons(neurons: NeuronSet) -> ShownNeurons:
    """Return a set with its sizes, shares and the three best scores by layer."""
    layers = {}
    for layer, index in sorted(neurons.indices.items()):
        best = []
        if (scores := neurons.scores.get(layer)) is not None:
            top = scores.topk(min(BEST, len(scores)))
            best = [BestNeuron(neuron=int(index[i]), score=float(s)) for i, s in zip(top.indices, top.values, strict=True)]
        layers[str(layer)] = LayerNeurons(size=len(index), of=neurons.units[layer], best=best)
    return ShownNeurons(
        name=neurons.name,
        kind=neurons.kind,
        size=neurons.size,
        share=neurons.share,
        base=neurons.base,
        digest=neurons.digest(),
        layers=layers,
        evidence=dict(neurons.evidence),
    )
