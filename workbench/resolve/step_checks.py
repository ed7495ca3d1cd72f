"""Checks of what single methods need: bricks as whole models, multimodal bricks, and sets of neurons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from workbench.bricks.card import read_card
from workbench.bricks.hub import Hub
from workbench.bricks.locate import kinds_of
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.foreign_names import CARD
from workbench.resolve.checks import compare_configs, read_notes
from workbench.resolve.findings import Findings, read_digest
from workbench.resolve.resolved import Resolved
from workbench.steps.fields import NESTED, Where
from workbench.vocabulary.tokens import check_same_vocabulary, has_tokenizer

if TYPE_CHECKING:
    from workbench.steps import GrowMethod


def check_teacher(name: str, resolved: Resolved) -> None:
    """Check that a brick, a checkpoint or a recipe, can teach: it has a tokenizer of its own and is another model than the base.

    Raises:
        WorkbenchError: If it has no tokenizer, or is the base itself.
    """
    path = resolved.tokenizer_of(name)
    if not has_tokenizer(path):
        raise InvalidRecipeError(
            f"brick '{name}' is a teacher, but {path} has no tokenizer (expected tokenizer.json)",
            "Copy the tokenizer's files there: the teacher reads the texts with its own tokens.",
        )
    same = name in resolved.on_disk and resolved.on_disk[name].path.resolve() == resolved.base_path.resolve()
    if same and resolved.base_adapter is None:
        raise InvalidRecipeError(
            f"brick '{name}' is a teacher, but it is the base itself ({path}), which has nothing to teach it",
            "Name another model, or remove it: `with_base: true` fuses the distributions of the base already.",
        )


def check_whole_model(name: str, resolved: Resolved) -> list[str]:
    """Check the vocabulary of a brick that steps use as a whole model. The step itself compares shapes.

    Returns:
        Warnings about tokens and settings that differ from the base's.

    Raises:
        WorkbenchError: If the same row belongs to different tokens, unless the brick has `any_base`.
    """
    if resolved.vocabulary is not None:
        if name in resolved.nested:
            raise WorkbenchError(
                f"brick '{name}': a recipe cannot be a whole model in a recipe with a `tokenizer` block",
                "Run that recipe with `-o DIR`, and use the directory as the brick.",
            )
        return []
    base = resolved.checkpoint
    if name in resolved.nested:
        source, path = resolved.nested[name].checkpoint, resolved.nested[name].tokenizer_path
        warnings = []
    else:
        brick = resolved.on_disk[name]
        if brick.kind == "adapter":
            return []
        source, path = brick.checkpoint, brick.path
        warnings = [*read_notes(source), *compare_configs(brick, base)]
    try:
        return [*warnings, *check_same_vocabulary(name, path, source.specs, base.path, base.specs)]
    except WorkbenchError as error:
        if resolved.recipe.fields.bricks[name].any_base:
            return [*warnings, error.message]
        hint = f"To use its layers with this vocabulary nevertheless, add `any_base: true` to the brick. {error.hint}"
        raise error.reworded(error.message, hint) from None


def tokenizer_of(resolved: Resolved, name: str) -> Path:
    """Return the directory of a brick's tokenizer.

    Raises:
        WorkbenchError: If the brick has none, or the recipe has a `tokenizer` block, which says the same.
    """
    if resolved.vocabulary is not None:
        raise InvalidRecipeError(
            f"`tokenizer: {name}` of a step contradicts the recipe's `tokenizer` block", "Remove one of them."
        )
    path = resolved.nested[name].tokenizer_path if name in resolved.nested else resolved.on_disk[name].path
    if not has_tokenizer(path):
        raise InvalidRecipeError(
            f"brick '{name}' is named for the tokenizer, but {path} has none (expected tokenizer.json)",
            "Name a brick with a tokenizer, or remove `tokenizer` from the step to keep the base's.",
        )
    return path


def check_parts(resolved: Resolved) -> Iterator[WorkbenchError]:
    """Yield an error for each multimodal brick of `grow: components` that lacks `part: language`, or whose tokens the result lacks."""
    recipe = resolved.recipe
    for i, step in enumerate(recipe.steps):
        if step.kind != "grow" or not (step := cast("GrowMethod", step)).composes:
            continue
        if i < len(recipe.steps) - 1:
            text = f"no step can follow `grow: {step.name}`, because steps work on text models"
            yield recipe.error(("steps", i + 1), text, f"Make `grow: {step.name}` the last step.")
        for name in step.names():
            ref = recipe.fields.bricks.get(name)
            if ref is not None and ref.part is None and ref.kind not in NESTED:
                text = f"brick '{name}' gives encoders to the result, so it must be a multimodal checkpoint with `part: language`"
                hint = f"Write `{name}: {{checkpoint: {ref.target}, part: language}}`."
                yield recipe.error(("bricks", name), text, hint)
            elif (
                step.check == "full"
                and name in resolved.on_disk
                and (reason := compare_configs(resolved.on_disk[name], resolved.checkpoint))
            ):
                text = f"{reason[0].partition(';')[0]}, so its text decoder computes another function than the base with equal weights"
                hint = "Set `base:` to the text model that it was made from. `check: off` in the step writes the result nevertheless."
                yield recipe.error(("steps", i, "from"), text, hint)
        block, source = recipe.fields.tokenizer, step.tokenizer_brick()
        if block is not None and block.source != source:
            text = f"the result has the configuration of brick '{source}', whose placeholders for images are tokens of its own tokenizer"
            yield recipe.error(("tokenizer", "source"), text, f"Write `tokenizer: {{source: {source}}}`.")


def check_neurons(resolved: Resolved, hub: Hub, findings: Findings) -> None:
    """Record an error for each step whose set of neurons is missing, damaged or chosen on another model.

    The digest of the base is compared at `run` if its tensors are not local.
    """
    for number, step in enumerate(resolved.recipe.steps):
        if not (named := step.neuron_set()):
            continue
        path, folder = named
        try:
            _check_neuron_set(resolved, hub, findings, number, folder, ".".join(path))
        except WorkbenchError as error:
            findings.problems.append(resolved.recipe.error(("steps", number, *path), error.message, error.hint))


def _check_neuron_set(resolved: Resolved, hub: Hub, findings: Findings, number: int, folder: str, field: str) -> None:
    from workbench.activations.sets import RECORD, set_masks

    recipe, step = resolved.recipe, resolved.recipe.steps[number]
    place, label = recipe.project / folder, f"{field}: {folder}"
    if not (place / RECORD).is_file():
        if not place.is_dir():
            raise WorkbenchError(f"{label}: no such directory", "Paths start at the project folder.")
        kinds = kinds_of(place)
        what = f"it is {'an adapter' if kinds[0] == 'adapter' else 'a checkpoint'}" if kinds else "it is no brick"
        raise WorkbenchError(
            f"{label}: expected a set of neurons with a {RECORD}, but {what}",
            "List bricks with weights under `bricks`. `workbench analyze` makes a set of neurons.",
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
    if neurons.base is None:
        findings.warnings.append(f"{label}: the set does not record the weights that its neurons were chosen on")
        return
    card = read_card(place) if (place / CARD).is_file() else None
    with findings.or_at_run(f"{label}: the neurons were chosen on this base"):
        digest = read_digest(resolved, hub)
        if card is None or digest not in card.base.aliases:
            neurons.check_model(neurons.units, digest, label)
