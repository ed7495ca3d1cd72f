"""Bricks that are sets of the base's own neurons: a card beside the set's files, and checks against a base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.activations.places import set_masks
from workbench.activations.sets import RECORD, NeuronSet, read_set, write_set
from workbench.bricks.axes import Axes, axes_of
from workbench.bricks.card import BaseRecord, BrickCard, read_card, write_card
from workbench.bricks.hub import CARD
from workbench.errors import GateFailedError, WorkbenchError
from workbench.models.layout import Model

MADE_BY = "workbench analyze functions"


def write_neuron_brick(
    folder: Path, neurons: NeuronSet, base: BaseRecord, skill: str = "", *, made_by: str = MADE_BY, **fields: Any
) -> BrickCard:
    """Write a set of neurons as a brick: neurons.json, neurons.safetensors and brick.yaml.

    Args:
        folder: Directory of the brick; its name is the brick's.
        neurons: The set.
        base: The model that the neurons belong to. If it has no digest, it takes the set's.
        skill: One line that describes the function of the neurons.
        made_by: The command that makes the brick, for the card.
        **fields: Other fields of the card, such as `functions` and `licence`.
    """
    digest = base.digest or neurons.base
    write_set(folder, replace(neurons, base=neurons.base or digest))
    card = BrickCard(
        version=1,
        name=folder.name,
        kind="neurons",
        skill=skill or f"{neurons.size:,} {neurons.kind} for {neurons.name} ({100 * neurons.share:.3g} %)",
        base=base.model_copy(update={"digest": digest}),
        digest=neurons.digest(),
        **{"functions": (neurons.name,), **fields},
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


def fits(neurons: NeuronSet, card: BrickCard | None, base: Model, digest: str | None, label: str) -> int:
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


def document(neurons: NeuronSet) -> dict[str, Any]:
    """Return a set as plain data: sizes, shares and the best scores by layer."""
    layers = {
        str(layer): {
            "size": len(index),
            "of": neurons.units[layer],
            "best": _best(neurons, layer, 3),
        }
        for layer, index in sorted(neurons.indices.items())
    }
    return {
        "name": neurons.name,
        "kind": neurons.kind,
        "size": neurons.size,
        "share": neurons.share,
        "base": neurons.base,
        "digest": neurons.digest(),
        "layers": layers,
        "evidence": dict(neurons.evidence),
    }


def _best(neurons: NeuronSet, layer: int, count: int) -> list[dict[str, float]]:
    """Return the neurons of a layer with the highest scores, best first; empty if the set has no scores."""
    scores = neurons.scores.get(layer)
    if scores is None:
        return []
    best = scores.topk(min(count, len(scores)))
    index = neurons.indices[layer]
    return [
        {"neuron": int(index[place]), "score": float(score)}
        for place, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
