"""Checks of the sets of neurons that steps name: they exist, belong to the base, and select something."""

from __future__ import annotations

from pathlib import Path

from workbench.activations.places import set_masks
from workbench.activations.sets import RECORD, NeuronSet
from workbench.bricks.card import read_card
from workbench.bricks.hub import CARD, Hub
from workbench.bricks.locate import kinds_of
from workbench.errors import WorkbenchError
from workbench.resolve.checks import read_digest
from workbench.resolve.findings import Findings
from workbench.resolve.resolved import Resolved
from workbench.steps.fields import Where


def check_neurons(resolved: Resolved, hub: Hub, findings: Findings) -> None:
    """Record an error for each step whose set of neurons is missing, damaged or chosen on another model.

    The digest of the base is compared at `run` if its tensors are not local.

    Args:
        resolved: The recipe with its inputs.
        hub: Access to the hub.
        findings: Receives warnings, deferred checks and problems.
    """
    for number, step in enumerate(resolved.recipe.steps):
        if not (named := step.neuron_set()):
            continue
        path, folder = named
        try:
            _check(resolved, hub, findings, number, folder, ".".join(path))
        except WorkbenchError as error:
            findings.problems.append(resolved.recipe.error(("steps", number, *path), error.message, error.hint))


def _check(resolved: Resolved, hub: Hub, findings: Findings, number: int, folder: str, field: str) -> None:
    recipe, step = resolved.recipe, resolved.recipe.steps[number]
    place, label = recipe.project / folder, f"{field}: {folder}"
    if not (place / RECORD).is_file():
        if not place.is_dir():
            raise WorkbenchError(f"{label}: no such directory", "Paths start at the project folder.")
        kinds = kinds_of(place)
        what = f"it is {'an adapter' if kinds[0] == 'adapter' else 'a checkpoint'}" if kinds else "it is no brick"
        raise WorkbenchError(
            f"{label}: expected a set of neurons with a {RECORD}, but {what}",
            "List bricks with weights under `bricks`. `workbench analyze functions` makes a set of neurons.",
        )
    neurons = resolved.neurons(folder)
    grown = next((recipe.step_ids[i] for i in range(number) if recipe.steps[i].verb == "grow"), None)
    if grown and not step.merges:  # a merge finds the base's tensors in the grown model
        raise WorkbenchError(
            f"{label}: step '{grown}' grows the model first, so that layers and neurons have other numbers than in the set",
            f"Put this step before '{grown}'.",
        )
    masks = set_masks(neurons, resolved.base, label)
    where = getattr(step, "where", None)
    if isinstance(where, Where) and not any(where.matches(n, resolved.base) for n, mask in masks.items() if not mask.empty):
        raise WorkbenchError(
            f"{label}: `include`, `exclude` and `layers` select no tensor with neurons of the set",
            "Remove `neurons`, or include the feed-forward tensors.",
        )
    _check_digest(resolved, hub, findings, neurons, resolved.recipe.project / folder, label)


def _check_digest(resolved: Resolved, hub: Hub, findings: Findings, neurons: NeuronSet, place: Path, label: str) -> None:
    """Compare the weights that a set was chosen on with the base's; warn if the set does not record them."""
    if neurons.base is None:
        findings.warnings.append(f"{label}: the set does not record the weights that its neurons were chosen on")
        return
    card = read_card(place) if (place / CARD).is_file() else None
    with findings.or_at_run(f"{label}: the neurons were chosen on this base"):
        digest = read_digest(resolved, hub)
        if card is None or digest not in card.base.aliases:
            neurons.check_model(neurons.units, digest, label)
