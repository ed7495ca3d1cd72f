"""`edit rebase`: solving an edit brick again, with its own facts and settings, on a merged or changed model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.bricks.brick import Brick
from workbench.bricks.locate import resolve_brick
from workbench.edit.places.knowledge import said_by
from workbench.facts.facts import FACTS, Fact
from workbench.facts.published import read_facts
from workbench.ground.errors import UsageError, WorkbenchError, shell
from workbench.ground.events import Events, no_events, progress
from workbench.ground.files import check_new, new_directory
from workbench.ground.foreign_names import brick_name
from workbench.ground.lazy import torch
from workbench.ground.project import find_project
from workbench.ground.results import JsonObject, Number
from workbench.ground.yamldoc import Document, scalar
from workbench.models.architecture import live_module
from workbench.models.identity import vocabulary_digest
from workbench.models.layout import Model
from workbench.recipe.methods import method
from workbench.recipe.schema import Output
from workbench.resolve.edits import edit_record
from workbench.run.compose import compose
from workbench.run.kind import kind_of
from workbench.run.kinds.edit import RECORD, write_edit
from workbench.run.opened import NamedModel
from workbench.run.record import EfficacyError, FactsSaid
from workbench.run.teaching import LiveSession, live_session, refusal
from workbench.steps import Edit, EditMethod, MethodContext
from workbench.steps.fields import BrickRef
from workbench.weights.device import exact
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EditBrick:
    """An edit brick on disk.

    Attributes:
        brick: Its files.
        record: Content of edit.json, the record of how it was solved.
        facts: Its facts.
        step: Settings of the edit step.
    """

    brick: Brick
    record: dict[str, Any]
    facts: list[Fact]
    step: EditMethod

    @property
    def place(self) -> Path:
        """Path of the brick's facts file."""
        return self.brick.path / FACTS


def read_edit(folder: Path, settings: Sequence[str] = ()) -> EditBrick:
    """Read an edit brick.

    Args:
        folder: Directory of the brick, or `edits/STEP` of a run.
        settings: Fields of its step to override, "field=value".

    Raises:
        WorkbenchError: If the directory is not an edit brick or has no facts, its method does not exist, or a setting is not a
            field of the method.
    """
    if not folder.is_dir():
        raise WorkbenchError(
            f"{folder}: no such directory",
            "The edits of a run are in runs/NAME/edits/STEP; `workbench brick ls` lists other bricks.",
        )
    brick = resolve_brick(brick_name(folder), BrickRef(path=str(folder.resolve())), folder)
    record = edit_record(brick)
    if record is None:
        raise WorkbenchError(
            f"{folder}: not an edit brick (no {RECORD} that records the model it was solved on)",
            "The edits of a run are in runs/NAME/edits/STEP. Trained bricks cannot be rebased: merge them as they are.",
        )
    if not (brick.path / FACTS).is_file():
        raise WorkbenchError(
            f"{folder}: the edit brick has no {FACTS}, so its facts are not known",
            f"Put the facts file that it was solved from next to its {RECORD}, as {FACTS}.",
        )
    facts = read_facts(brick.path / FACTS, f"{folder}/{FACTS}")
    return EditBrick(brick, record, facts, _step(record, settings, folder))


def _step(record: Mapping[str, Any], settings: Sequence[str], folder: Path) -> EditMethod:
    """Return the settings that the brick was solved with, with overrides applied."""
    data = {**dict(record.get("step") or {}), **{k: record[k] for k in ("min_efficacy",) if k in record}}
    document = Document(data, {}, f"{folder}/{RECORD}, step")
    kind = method(EditMethod, str(record.get("method")), find_project(folder.resolve() / RECORD))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {setting}: expected FIELD=VALUE", "Example: --set unconverged=skip")
        value = scalar(text)
        data[key] = value.data
        document.replace_texts((key,), value)
    return document.validate(kind)


class SaidShares(JsonObject):
    """Shares of facts that the model says, from 0 to 1."""

    without: Number
    """Share without the edit."""
    before: Number | None
    """Share with the old brick added as a delta; null if it does not fit the model."""
    after: Number
    """Share with the new brick."""


class Rebased(JsonObject):
    """An edit that was solved again on another model."""

    brick: str
    """Directory of the new brick."""
    source: str = Field(serialization_alias="from")
    """Directory of the old brick."""
    method: str
    """Edit method."""
    facts: int
    """Number of facts."""
    onto: str
    """Name of the recipe or model that it was solved on."""
    base: str
    """Digest of the base."""
    solved_on: str
    """Key of the weights that it was solved on."""
    kept: dict[str, list[int] | str]
    """Field whose value is `auto` -> the old brick's value, which was kept."""
    said: SaidShares
    """Shares of facts that the model says."""
    not_said: list[str]
    """Ids of facts that the model does not say with the new brick."""
    unlisted: list[str]
    """Ids of steps of the recipe that list no bricks, so that they would also merge the new brick."""


def rebase(
    folder: Path,
    onto: NamedModel,
    out: Path,
    *,
    device: torch.device,
    remeasure: bool = False,
    settings: Sequence[str] = (),
    events: Events = no_events,
) -> Rebased:
    """Solve an edit brick again on the configuration of a recipe or on a model, and write the result as a new edit brick.

    Values are optimized from scratch, because the keys differ on another model. With a recipe, the new brick's base is the
    recipe's base, and a last step that adds the brick to the recipe is exact.

    Args:
        folder: Directory of the edit brick.
        onto: The model, with the base's name on the new card.
        out: New directory, written atomically.
        device: Device for the computation.
        remeasure: Whether to determine settings with the value `auto` again; otherwise layers and positions stay those of the
            old brick.
        settings: Fields of the step to override, "field=value".
        events: Callback that receives progress events.

    Raises:
        WorkbenchError: If `read_edit` rejects the brick, the tokenizers differ, the recipe grows the base, no value is found
            for a fact, or `out` exists.
    """
    old = read_edit(folder, settings)
    check_new(out)
    _check_onto(old, onto)
    name, project = onto.name, onto.resolved.recipe.project
    step, fixed_settings = (old.step, {}) if remeasure else _fix_auto(old)
    # Of a step that continues another run, the brick's facts file holds the facts of both.
    anew = {"continues": None, "first": None} if getattr(step, "continues", None) else {}
    step = step.model_copy(update={"facts": os.path.relpath(old.place.resolve(), project.resolve()), **anew})
    _check_inputs(step, project)
    with exact(device):
        session = _live(old, onto, device, events)
        correct = {"without": _correct(session.context, old.facts), "before": _correct_with_old(old, session)}
        events({"stage": "edit", "step": old.brick.name, "text": f"{step.name} on {name}, {device}"})
        edit = _solve(step, session.context)
        with added(session.context.model, edit.factors):
            correct["after"] = _correct(session.context, old.facts)
    efficacy = FactsSaid.count(old.facts, correct["after"] or [], step.min_efficacy)
    if efficacy.too_few:
        message, hint = refusal(f"{old.brick.name} on {name}", efficacy, set_by="`--set min_efficacy=0`", what="brick")
        raise EfficacyError(message, hint, {old.brick.name: efficacy})
    rebased = {
        "digest": old.brick.digest(None),
        "solved_on": old.record["solved_on"],
        "onto": name,
        "kept": fixed_settings,
        "said": {when: None if answers is None else sum(answers) / len(answers) for when, answers in correct.items()},
    }
    edit = replace(edit, record={**edit.record, "rebased": rebased, "said": efficacy.to_dict()})
    with new_directory(out) as partial:
        _write(edit, old, partial, session, {"name": brick_name(out), **({"base": {"id": onto.base}} if onto.base else {})})
    recipe = session.resolved.recipe
    return Rebased(
        brick=str(out),
        source=str(old.brick.path),
        method=old.step.name,
        facts=len(old.facts),
        onto=name,
        base=session.resolved.base_digest,
        solved_on=session.solved_on,
        kept=fixed_settings,
        said=SaidShares.model_validate(rebased["said"]),
        not_said=efficacy.not_said,
        unlisted=[step_id for step, step_id in zip(recipe.steps, recipe.step_ids, strict=True) if step.names() is None],
    )


def _check_onto(old: EditBrick, model: NamedModel) -> None:
    """Raise WorkbenchError if the edit cannot be solved on a configuration: other vocabulary, growth, or a memory.

    Rules that split texts may differ: facts are tokenized again, and positions are looked up again.
    """
    name, onto = model.name, model.resolved
    old_vocabulary, new_vocabulary = old.record.get("vocabulary"), vocabulary_digest(onto.tokenizer_path)
    if old_vocabulary and new_vocabulary and old_vocabulary != new_vocabulary:
        raise WorkbenchError(
            f"{name} has another tokenizer than the base that {old.brick.name} was solved on: its layers and positions do not apply",
            f"Solve the facts from scratch, with an `edit` step with `facts: {os.path.relpath(old.place)}` in a recipe on that base.",
        )
    for step, step_id in zip(onto.recipe.steps, onto.recipe.step_ids, strict=True):
        if kind_of(step).shapes(step, onto, onto.base) is not onto.base:
            raise WorkbenchError(
                f"{name} grows its base (step '{step_id}'), so a brick for the grown layers would not fit the recipe's base",
                f"Write the grown model and use it: `workbench run {shell(onto.recipe.path or name)} -o DIR`, then `--onto DIR`.",
            )
        if step.ends_recipe:
            raise WorkbenchError(
                f"{name} ends with a {onto.beside} (step '{step_id}'), which overrides the answers of the weights",
                "Use a recipe without that step, and add the new brick's step before it.",
            )


def _fix_auto(old: EditBrick) -> tuple[EditMethod, dict[str, object]]:
    """Return the step with `auto` replaced by the values measured on the old base, and these values."""
    record, changes = old.record, dict[str, object]()
    if getattr(old.step, "layers", None) == "auto" and isinstance(record.get("layers"), list):
        changes["layers"] = tuple(record["layers"])
    if getattr(old.step, "position", None) == "auto":
        positions = set((record.get("positions") or {}).values()) or {record.get("position")}
        if len(positions) == 1 and positions != {None}:
            changes["position"] = positions.pop()
    return old.step.model_copy(update=changes), changes


def _check_inputs(step: EditMethod, project: Path) -> None:
    if missing := [file for file in step.inputs() if not (project / file).is_file()]:
        raise WorkbenchError(
            f"{missing[0]}, which the edit was solved with, does not exist in {project}",
            "Put the file there or, if the method does not require it, disable it: `--set preserve=null`.",
        )
    step.check_inputs(project)


def _live(old: EditBrick, onto: NamedModel, device: torch.device, events: Events) -> LiveSession:
    """Build the configuration as a live model, before its output is cast or reduced to a rank."""
    recipe = onto.resolved.recipe
    plain = replace(onto.resolved, recipe=replace(recipe, fields=recipe.fields.model_copy(update={"output": Output()})))
    composed = compose(plain, device, events)
    seed = int(old.record.get("seed", plain.recipe.fields.seed))
    report = progress(events, "edit", onto.name)
    session = live_session(plain, len(plain.recipe.steps), composed.model, device, report, rounded_to=torch.float32, seed=seed)
    return replace(session, context=replace(session.context, earlier=list(composed.edits.values())))


def _solve(step: EditMethod, context: MethodContext) -> Edit:
    try:
        return step.solve(context)
    except WorkbenchError as error:
        hint = f"{error.hint or ''} Set fields of the step with `--set FIELD=VALUE`.".strip()
        raise error.reworded(error.message, hint) from None


def _correct_with_old(old: EditBrick, session: LiveSession) -> list[bool] | None:
    """Check the facts with the old brick added to the model, unless the model contains it; return None if it does not fit."""
    digest = old.brick.digest(None)
    edits = {b.digest(None) for b in session.resolved.on_disk.values() if edit_record(b)}
    if digest in edits:
        return _correct(session.context, old.facts)
    try:
        updates = updates_of(old.brick.adapter, session.context.layout, session.context.model, session.context.device)
    except WorkbenchError:
        return None
    with added(session.context.model, updates):
        return _correct(session.context, old.facts)


def updates_of(adapter: Adapter, layout: Model, model: PreTrainedModel, device: torch.device) -> dict[str, Factors]:
    """Return an edit's adapter as factors for the live weights, by their names."""
    bound = bind(adapter, layout.weights.specs, layout)
    modules = dict(model.named_modules())
    factors = {name: bound.factors(name, device) for name in bound.places}
    return {f"{live_module(name, modules)}.weight": update for name, update in factors.items() if update is not None}


@contextmanager
def added(model: PreTrainedModel, updates: Mapping[str, Factors]) -> Iterator[None]:
    """Add updates to the weights of a live model inside a `with` block, and restore the weights bit for bit afterwards."""
    weights = {name: model.get_parameter(name) for name in updates}
    saved = {name: weight.data for name, weight in weights.items()}
    try:
        for name, update in updates.items():
            data = saved[name]
            product = update.left.to(data.device) @ update.right.to(data.device)
            weights[name].data = data + product.reshape(data.shape).to(data.dtype)  # a bias is a matrix with one column
        yield
    finally:
        for name, weight in weights.items():
            weight.data = saved[name]


def _correct(context: MethodContext, facts: Sequence[Fact]) -> list[bool]:
    return said_by(context.model, context.tokenizer, facts, context.device)


def _write(edit: Edit, old: EditBrick, out: Path, session: LiveSession, card: dict[str, object]) -> None:
    """Write the new brick. Its record keeps the original step with `auto`, so that a later rebase can measure again."""
    if old.brick.card:
        card = {**card, "licence": old.brick.card.licence, "data_licences": old.brick.card.data_licences}
    write_edit(edit, old.step, out, session, card, "workbench edit rebase")
    if (out / FACTS).is_file():
        return
    (out / FACTS).write_bytes(old.place.read_bytes())
