"""Inputs of `brick transplant`: the brick, both models and their layers, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workbench.adapters.bind import BoundAdapter, bind
from workbench.adapters.linear import as_lora, not_linear
from workbench.adapters.live import live_places
from workbench.bricks.brick import Brick
from workbench.bricks.locate import base_of, kinds_of, locate, resolve_base, resolve_brick
from workbench.bricks.origin import NamedBase, check_origin
from workbench.ground.errors import UsageError, WorkbenchError, shell
from workbench.ground.foreign_names import brick_name
from workbench.ground.project import cache_of
from workbench.models.architecture import EXPERT_COUNTS, text_parts
from workbench.models.layout import Model
from workbench.models.skeleton import tidy
from workbench.resolve.edits import edit_record
from workbench.steps.fields import BrickRef
from workbench.transplant.carried import NEED_TEXTS, By
from workbench.transplant.counterparts import LayerMap, Linear, Plan, layer_map, linears, parsed_map, plan_moves
from workbench.weights.checkpoint import Checkpoint, read_config
from workbench.weights.digests import tensor_digests, weights_digest


@dataclass(frozen=True)
class Wanted:
    """What the user asks for.

    Attributes:
        brick: Directory of the adapter.
        to: Directory or hub id of the target.
        on: Directory or hub id of the adapter's base; None takes the one that the brick names.
        by: How units are matched; None chooses by shapes and texts.
        mapping: Layer map as the user wrote it; None takes equal layers, or evenly spaced ones for another depth.
        texts: File of texts.
        force: Whether to write an adapter at chance level, of another base, or without the layers that have no counterpart.
    """

    brick: Path
    to: str
    on: str | None = None
    by: By | None = None
    mapping: str | None = None
    texts: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Inputs:
    """Checked inputs.

    Attributes:
        brick: The adapter.
        base: The source's name.
        bound: The adapter's updates on the source.
        source: The source.
        target: The target.
        target_digest: Digest of the target's weights and configuration.
        layers: The layer map.
        plan: The counterparts.
        by: How units are matched.
        modules: Tensor of the source -> its linear layer.
        notes: Warnings for the user.
    """

    brick: Brick
    base: str
    bound: BoundAdapter
    source: Model
    target: Model
    target_digest: str
    layers: LayerMap
    plan: Plan
    by: By
    modules: dict[str, Linear]
    notes: list[str]


def read_inputs(wanted: Wanted, project: Path) -> Inputs:
    """Find the brick and both models, and check from headers and digests that the brick can be carried.

    Args:
        wanted: What the user asks for.
        project: Directory that relative paths start from.

    Raises:
        WorkbenchError: If the brick is no plain LoRA of its base, the target has no counterpart of it, or the shapes do not fit the way.
    """
    if wanted.texts is None and wanted.by in NEED_TEXTS:
        raise UsageError(f"--by {wanted.by} reads texts, and --texts is missing", "Add --texts FILE.jsonl.")
    brick = _brick(wanted.brick, project)
    base = wanted.on or base_of(wanted.brick, project, "Name the model that the brick was trained on: --on MODEL.")
    checkpoint, _ = resolve_base(base, project)
    source, target = Model(checkpoint, checkpoint.config), _target(wanted.to, project)
    bound = _bound(brick, source, base)
    named = NamedBase(base, checkpoint.path, source, _digest(source, project))
    try:
        warnings = check_origin(brick, named, project, any_base=wanted.force)
    except WorkbenchError as error:
        hint = "Name the model that it was trained on with --on MODEL. To carry it from this one nevertheless, add --force."
        raise error.reworded(error.message, hint) from None
    notes = [note.partition(". ")[0] for note in warnings]  # the full text gives advice on recipes
    target_digest = _digest(target, project)
    if target_digest == _digest(source, project):
        raise WorkbenchError(f"--to {wanted.to} is the base of {brick.label}", "The brick can be used there as it is.")
    depths = source.layout.depth, target.layout.depth
    layers = parsed_map(wanted.mapping, *depths) if wanted.mapping else layer_map(*depths)
    modules, theirs = linears(source, live_places(source)), linears(target, live_places(target))
    plan = plan_moves(sorted(bound.places), modules, theirs, layers)
    _check_plan(plan, brick, target, wanted)
    by = _matching(wanted, plan)
    return Inputs(brick, base, bound, source, target, target_digest, layers, plan, by, modules, notes)


def _brick(folder: Path, project: Path) -> Brick:
    """Return the brick in a directory, which must be an adapter."""
    brick = resolve_brick(brick_name(folder), BrickRef(path=str(folder.resolve())), project)
    if brick.kind != "adapter":
        raise WorkbenchError(
            f"{brick.label} is a {brick.kind}, expected an adapter",
            f"Turn it into one: `{shell('workbench', 'brick', 'extract', folder, '--base')} BASE {shell('-o', f'bricks/{brick.name}-lora')}`.",
        )
    if edit_record(brick) is not None:
        raise WorkbenchError(
            f"{brick.label} is an edit brick, whose facts are known",
            f"Solve them on the other model: `{shell('workbench', 'edit', 'rebase', folder, '--onto')} MODEL {shell('-o', f'bricks/{brick.name}-rebased')}`.",
        )
    return brick


def _target(reference: str, project: Path) -> Model:
    """Return the target, which must be a checkpoint."""
    path, _ = locate(reference, project, "--to")
    if "checkpoint" not in kinds_of(path):
        found = "an adapter" if kinds_of(path) else "no checkpoint (it has no config.json)"
        raise WorkbenchError(f"--to {reference} is {found}, expected a model", "Name a model directory or a hub id.")
    read_config(path, "--to")
    checkpoint = Checkpoint(path, "--to")
    tidy(checkpoint)
    return Model(checkpoint, checkpoint.config)


def _digest(model: Model, project: Path) -> str:
    """Return the digest of a checkpoint's weights and configuration."""
    assert isinstance(model.weights, Checkpoint)
    return weights_digest(model.weights.specs, tensor_digests(model.weights.entries, cache_of(project)), model.config)


def _bound(brick: Brick, source: Model, base: str) -> BoundAdapter:
    """Return the updates of a plain LoRA on its base."""
    try:
        bound = bind(brick.adapter, source.weights.specs, source)
    except WorkbenchError as error:
        hint = f"{base} may not be the model that it was trained on: name that one with --on MODEL. {error.hint or ''}"
        raise error.reworded(error.message, hint.strip()) from None
    if found := not_linear(brick.adapter, bound):
        raise WorkbenchError(
            f"{brick.label} has {found}; only plain LoRA on linear layers outside of experts is carried",
            f"Turn it into plain LoRA: {as_lora(brick.name, str(brick.path))}",
        )
    return bound


def _check_plan(plan: Plan, brick: Brick, target: Model, wanted: Wanted) -> None:
    """Raise WorkbenchError if nothing is carried, or if the target's experts leave a feed-forward layer without its counterpart."""
    mixture = any(part.get(count) for part in text_parts(target.config) for count in EXPERT_COUNTS)
    lost = sorted({name.rpartition(".")[0] for name, why in plan.left.items() if why == "the target has no module of this name"})
    if mixture and lost and plan.moves and not wanted.force:
        raise WorkbenchError(
            f"{wanted.to} is a mixture of experts, and {len(lost)} modules that {brick.label} updates have no counterpart there ({lost[0]}, …)",
            "Add --force to carry the other modules alone.",
        )
    if not plan.moves:
        why = next(iter(plan.left.values()), "the adapter updates nothing")
        name = next(iter(plan.left), brick.label)
        raise WorkbenchError(
            f"no update of {brick.label} has a counterpart in {wanted.to}: {name}: {why}",
            "Modules are matched by their names within a layer, so both models need the same names; `--map` chooses layers.",
        )


def _matching(wanted: Wanted, plan: Plan) -> By:
    """Return the way that the user asks for, or that shapes and texts suggest; raise WorkbenchError if shapes rule it out."""
    move = next((m for m in plan.moves if m.source.shape != m.target.shape), None)
    if move is None:
        return wanted.by or "copy"
    shapes = f"{move.target.name} is {list(move.target.shape)}, {move.source.name} of its base is {list(move.source.shape)}"
    if wanted.by == "copy":
        raise WorkbenchError(
            f"--by copy needs equal shapes: {shapes} [outputs, inputs]", "Use --by ridge or --by assign with --texts FILE."
        )
    if wanted.by is None and wanted.texts is None:
        raise UsageError(
            f"the models have other widths ({shapes}), and --texts is missing",
            "Add --texts FILE.jsonl, on which the units of both models are matched.",
        )
    return wanted.by or "ridge"
