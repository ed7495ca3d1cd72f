"""Show and verify bricks that are sets of neurons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.bricks import brick_directory
from workbench.console.output import out
from workbench.ground.errors import UsageError, WorkbenchError, shell
from workbench.upkeep.commands.cards import axes_text

if TYPE_CHECKING:
    from workbench.activations.sets import NeuronSet
    from workbench.bricks.card import BrickCard
    from workbench.bricks.neuron_sets import ShownNeurons


def show_neurons(folder: Path, others: list[str], json: bool) -> None:
    """Print a set of neurons: its card, its layers with the best scores, and its overlap with other sets.

    Args:
        folder: Directory of the set.
        others: Names or directories of other sets.
        json: Print one JSON document instead.

    Raises:
        WorkbenchError: If another brick is no set of neurons of the same model.
    """
    from workbench.bricks.card import card_document
    from workbench.bricks.neuron_sets import neuron_axes_of, neuron_brick, shown_neurons
    from workbench.upkeep.bricks import ShownBrick

    neurons, card = neuron_brick(folder)
    axes, found = neuron_axes_of(neurons, card), shown_neurons(neurons)
    overlaps = {name: neurons.overlap(_other(neurons, name, folder)) for name in others}
    plain: dict[str, object] = card_document(card) if card else {"name": folder.name, "kind": "neurons"}
    shown = {**plain, "axes": axes, "neurons": found, **({"overlap": overlaps} if overlaps else {})}
    out.result(lambda: ShownBrick.model_validate(shown), lambda: _say(folder, neurons, found, card, axes, overlaps), json=json)


def _say(
    folder: Path,
    neurons: NeuronSet,
    found: ShownNeurons,
    card: BrickCard | None,
    axes: dict[str, str],
    overlaps: dict[str, float],
) -> None:
    """Print a set: size, base, axes, evidence, overlaps, and its best neurons by layer."""
    out.line(f"{folder.name}: set of {neurons.kind}" + (f", {card.skill}" if card and card.skill else ""))
    out.line(
        f"size     {neurons.size:,} of {sum(neurons.units.values()):,} {neurons.kind} ({100 * neurons.share:.3g} %) "
        f"in {len(neurons.indices)} of {len(neurons.units)} layers"
    )
    base = f"{card.base.title or card.base.id}  " if card else ""
    out.line(f"base     {base}{(neurons.base or 'unknown weights')[:12]}")
    out.line(f"axes     {axes_text(axes)}")
    for name, value in neurons.evidence.items():
        if isinstance(value, (str, int, float)):
            out.line(f"{name:<8} {value:g}" if isinstance(value, float) else f"{name:<8} {value}")
    for name, overlap in overlaps.items():
        out.line(f"overlap  {overlap:.3f} with {name} (random sets of this share: {neurons.share:.3f})")
    out.line("")
    rows = [
        [
            layer,
            f"{row.size:,}",
            f"{100 * row.size / row.of:.3g} %",
            ", ".join(f"{best.neuron} ({best.score:.3g})" for best in row.best),
        ]
        for layer, row in found.layers.items()
    ]
    out.table(["layer", neurons.kind, "share", "highest scores"], rows, right=(1, 2))


def verify_neurons(folder: Path, base: str | None) -> None:
    """Check a set's files, its digest and its fit to the base, and print the result.

    Args:
        folder: Directory of the set.
        base: Base to check it on; None takes the one on its card.

    Raises:
        WorkbenchError: If a check fails, or no base is named.
    """
    from workbench.bricks.brick import checkpoint_digest
    from workbench.bricks.locate import resolve_base
    from workbench.bricks.neuron_sets import check_base, neuron_brick
    from workbench.ground.project import cache_of
    from workbench.models.layout import Model

    neurons, card = neuron_brick(folder)
    if base is None and card is None:
        raise WorkbenchError(
            f"{folder.name}: the set has no card that names its base",
            shell("workbench", "brick", "verify", str(folder), "--base", "DIR"),
        )
    on = base or _named_base(card)
    checkpoint, _ = resolve_base(on, Path.cwd())
    digest = checkpoint_digest(checkpoint, cache_of(Path.cwd()))
    touched = check_base(neurons, card, Model(checkpoint, checkpoint.config), digest, folder.name)
    recorded = " as on its card" if card and card.digest else ", no digest on its card"
    out.line(
        f"{folder.name}: {neurons.size:,} {neurons.kind} with parts of {touched} tensors fit {on}, "
        f"digest {neurons.digest()[:12]}{recorded}"
    )
    if neurons.base is None:
        out.warn("the set does not record the weights that its neurons were chosen on, so only their numbers were compared")


def _named_base(card: BrickCard | None) -> str:
    assert card is not None
    return card.base.id


def _other(neurons: NeuronSet, name: str, folder: Path) -> NeuronSet:
    """Read another set of neurons of the same model."""
    from workbench.bricks.locate import is_neuron_set
    from workbench.bricks.neuron_sets import neuron_brick

    other = brick_directory(name)
    if not is_neuron_set(other):
        raise UsageError(f"{name} is no set of neurons, so it has no overlap with {folder.name}", "Name sets of neurons.")
    read, _ = neuron_brick(other)
    if dict(read.units) != dict(neurons.units):
        raise WorkbenchError(f"{name} and {folder.name} are sets of different models: their layers have other numbers of neurons")
    return read
