"""`edit rebase`: an edit brick solved again, with its own facts and settings, on a merged or changed model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.bricks.brick import Brick, vocabulary_digest
from workbench.bricks.locate import resolve_brick
from workbench.edit.greedy import count, said_by, too_few
from workbench.errors import WorkbenchError, shell
from workbench.events import Events, no_events, progress
from workbench.facts import Fact, read_facts
from workbench.library.extract import brick_name, check_new, new_directory
from workbench.models.layout import Model
from workbench.models.names import live_module
from workbench.project import find_project
from workbench.recipe.plugins import method
from workbench.recipe.schema import Output
from workbench.resolve.checks import edit_record
from workbench.resolve.resolved import Resolved
from workbench.run.compose import compose
from workbench.run.efficacy import EfficacyError, refusal
from workbench.run.kind import kind_of
from workbench.run.kinds.edit import FACTS, RECORD, write_edit
from workbench.run.session import LiveSession, live_session
from workbench.steps import Edit, EditMethod, MethodContext
from workbench.steps.fields import BrickRef
from workbench.weights.device import exact
from workbench.weights.lowrank import Factors
from workbench.yamldoc import Document, scalar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EditBrick:
    """An edit brick on disk: its files, the record of how it was solved, its facts, the settings of its step."""

    brick: Brick
    record: dict[str, Any]
    facts: list[Fact]
    step: EditMethod

    @property
    def place(self) -> Path:
        """Its facts file."""
        return self.brick.path / FACTS


def read_edit(folder: Path, settings: Sequence[str] = ()) -> EditBrick:
    """An edit brick.

    Args:
        folder: Its directory, or a run's `edits/STEP`.
        settings: Fields of its step to override, "field=value".

    Errors: not an edit brick, no facts beside it, a method that is not there, settings that are none of its fields.
    """
    if not folder.is_dir():
        raise WorkbenchError(
            f"{folder}: no such directory", "A run's edits are in runs/NAME/edits/STEP; `workbench brick ls` lists bricks."
        )
    brick = resolve_brick(brick_name(folder), BrickRef(path=str(folder.resolve())), folder)
    record = edit_record(brick)
    if record is None:
        raise WorkbenchError(
            f"{folder}: not an edit brick (no {RECORD} that says what it was solved on)",
            "A run's edits are in runs/NAME/edits/STEP. A trained brick does not move by facts: merge it as it is.",
        )
    if not (brick.path / FACTS).is_file():
        raise WorkbenchError(
            f"{folder}: an edit without {FACTS}: what it teaches is not known here",
            f"Put the facts file that it was solved from beside its {RECORD}, as {FACTS}.",
        )
    facts = read_facts(brick.path / FACTS, f"{folder}/{FACTS}")
    return EditBrick(brick, record, facts, _step(record, settings, folder))


def _step(record: Mapping[str, Any], settings: Sequence[str], folder: Path) -> EditMethod:
    """The settings that it was solved with."""
    data = {**dict(record.get("step") or {}), **{k: record[k] for k in ("min_efficacy",) if k in record}}
    document = Document(data, {}, f"{folder}/{RECORD}, step")
    kind = method(EditMethod, str(record.get("method")), find_project(folder.resolve() / RECORD))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise WorkbenchError(f"--set {setting}: expected FIELD=VALUE", "--set unconverged=skip", 2)
        value = scalar(text)
        data[key] = value.data
        document.replace_texts((key,), value)
    return document.validate(kind)


def rebase(
    folder: Path, name: str, onto: Resolved, out: Path, *, device: torch.device, base: str | None = None, remeasure: bool = False,
    settings: Sequence[str] = (), events: Events = no_events,
) -> dict[str, Any]:  # fmt: skip
    """Solve an edit brick again on the configuration of a recipe, or on a model, and write the result as a new edit brick.

    Values start afresh: the keys are others. With a recipe the new brick's base is the recipe's, and a last step that adds it is exact.

    Args:
        folder: The edit brick's directory.
        name: What the configuration is called.
        onto: The recipe, or a model as a recipe without steps.
        out: A new directory; there whole or not at all.
        device: Where it is solved.
        base: What the new card calls its base; omitted: as the recipe does.
        remeasure: Measure again what the step leaves to `auto`; else layers and positions stay those of the old brick.
        settings: Fields of the step to override, "field=value".
        events: Told what happens.

    Returns:
        What `edit rebase --json` prints. Errors: as `read_edit`; another tokenizer, a recipe that grows the base, facts for which no
        value is found, `out` exists.
    """
    old = read_edit(folder, settings)
    check_new(out)
    _check_onto(old, onto, name)
    step, kept = (old.step, {}) if remeasure else _kept(old)
    step = step.model_copy(update={"facts": os.path.relpath(old.place.resolve(), onto.recipe.project.resolve())})
    _check_inputs(step, onto.recipe.project)
    with exact(device):
        on = _live(old, onto, name, device, events)
        said = {"without": _said(on.context, old.facts), "before": _said_with_old(old, on)}
        events({"stage": "edit", "step": old.brick.name, "text": f"{step.name} on {name}, {device}"})
        edit = _solve(step, on.context)
        with added(on.context.model, edit.factors):
            said["after"] = _said(on.context, old.facts)
    counted = count(old.facts, said["after"] or [], step.min_efficacy)
    if too_few(counted):
        message, hint = refusal(f"{old.brick.name} on {name}", counted, set_by="`--set min_efficacy=0`", what="brick")
        raise EfficacyError(message, hint, {old.brick.name: counted})
    rebased = {
        "digest": old.brick.digest(None), "solved_on": old.record["solved_on"], "onto": name, "kept": kept,
        "said": {when: None if found is None else sum(found) / len(found) for when, found in said.items()},
    }  # fmt: skip
    edit = replace(edit, record={**edit.record, "rebased": rebased, "said": counted})
    with new_directory(out) as partial:
        _write(edit, old, partial, on, {"name": brick_name(out), **({"base": {"id": base}} if base else {})})
    return _document(old, on, out, said, rebased)


def _check_onto(old: EditBrick, onto: Resolved, name: str) -> None:
    mine, theirs = old.record.get("vocabulary"), vocabulary_digest(onto.tokenizer_path)
    if mine and theirs and mine != theirs:
        raise WorkbenchError(
            f"{name} has another tokenizer than the base that {old.brick.name} was solved on: layers and positions do not carry over",
            f"Solve the facts there from the start: an `edit` step with `facts: {os.path.relpath(old.place)}` in a recipe on that base.",
        )
    for step, step_id in zip(onto.recipe.steps, onto.recipe.step_ids, strict=True):
        if kind_of(step).shapes(step, onto.base, onto.base) is not onto.base:
            raise WorkbenchError(
                f"{name} grows its base (step '{step_id}'), and bricks of a recipe name the base's layers",
                f"Run it and name its model: `workbench run {shell(onto.recipe.path or name)} -o DIR`, then `--onto DIR`.",
            )
        if step.ends_recipe:
            raise WorkbenchError(
                f"{name} ends in a memory (step '{step_id}'), which answers before the weights do",
                "Name a recipe without that step; the new brick's step then stands before it.",
            )


def _kept(old: EditBrick) -> tuple[EditMethod, dict[str, Any]]:
    """The step with what was measured for the old base in place of `auto`, and what that is."""
    record, changes = old.record, {}
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
            f"{missing[0]}, which the edit was solved with, does not exist below {project}",
            "Put the file there, or leave it out where the method can do without: `--set preserve=null`.",
        )
    step.check_inputs(project)


def _live(old: EditBrick, onto: Resolved, name: str, device: torch.device, events: Events) -> LiveSession:
    """The configuration as a live model: before its output is cast, or cut to a rank."""
    plain = replace(onto, recipe=replace(onto.recipe, fields=onto.recipe.fields.model_copy(update={"output": Output()})))
    current = compose(plain, device, events).model
    seed = int(old.record.get("seed", plain.recipe.fields.seed))
    return live_session(plain, len(plain.recipe.steps), current, device, progress(events, "edit", name), seed=seed)


def _solve(step: EditMethod, context: MethodContext) -> Edit:
    try:
        return step.solve(context)
    except WorkbenchError as error:
        hint = f"{error.hint or ''} Here fields of the step are set by `--set FIELD=VALUE`.".strip()
        raise WorkbenchError(error.message, hint, error.exit_code) from None


def _said_with_old(old: EditBrick, on: LiveSession) -> list[bool] | None:
    """What the model says with the old brick added to it, unless it holds it already; None where it does not fit."""
    digest = old.brick.digest(None)
    held = {b.digest(None) for b in on.resolved.bricks.values() if isinstance(b, Brick) and edit_record(b)}
    if digest in held:
        return _said(on.context, old.facts)
    try:
        updates = updates_of(old.brick.adapter, on.context.layout, on.context.model, on.context.device)
    except WorkbenchError:
        return None
    with added(on.context.model, updates):
        return _said(on.context, old.facts)


def updates_of(adapter: Adapter, layout: Model, model: PreTrainedModel, device: torch.device) -> dict[str, Factors]:
    """An edit's adapter as factors for live weights, by their names. Errors: it does not fit."""
    bound = bind(adapter, layout.weights.specs, layout)
    modules = dict(model.named_modules())
    found = {name: bound.factors(name, device) for name in bound.places}
    return {f"{live_module(name, modules)}.weight": update for name, update in found.items() if update is not None}


@contextmanager
def added(model: PreTrainedModel, updates: Mapping[str, Factors]) -> Iterator[None]:
    """The live model with updates added to weights, inside the block; its own weights, bit for bit, after.

    Args:
        model: The model.
        updates: Live name of a weight -> update of it as it is stored.
    """
    weights = {name: model.get_parameter(name) for name in updates}
    saved = {name: weight.data for name, weight in weights.items()}
    try:
        for name, update in updates.items():
            data = saved[name]
            weights[name].data = data + (update.left.to(data.device) @ update.right.to(data.device)).to(data.dtype)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = saved[name]


def _said(context: MethodContext, facts: Sequence[Fact]) -> list[bool]:
    return said_by(context.model, context.tokenizer, facts, context.device)


def _write(edit: Edit, old: EditBrick, out: Path, on: LiveSession, card: dict[str, Any]) -> None:
    """The new brick. Its record keeps the step as it was written, so that a later rebase may measure again."""
    if old.brick.card:
        card = {**card, "licence": old.brick.card.licence, "data_licences": old.brick.card.data_licences}
    write_edit(edit, old.step, out, on, card, "workbench edit rebase")
    if (out / FACTS).is_file():
        return
    (out / FACTS).write_bytes(old.place.read_bytes())


def _document(
    old: EditBrick, on: LiveSession, out: Path, said: Mapping[str, list[bool] | None], rebased: Mapping[str, Any]
) -> dict[str, Any]:
    recipe = on.resolved.recipe
    after = said["after"] or []
    unlisted = [step_id for step, step_id in zip(recipe.steps, recipe.step_ids, strict=True) if step.names() is None]
    return {
        "brick": str(out), "from": str(old.brick.path), "method": old.step.name, "facts": len(old.facts), "onto": rebased["onto"],
        "base": on.resolved.base_digest, "solved_on": on.solved_on, "kept": rebased["kept"], "said": rebased["said"],
        "not_said": [fact.id for fact, right in zip(old.facts, after, strict=True) if not right], "unlisted": unlisted,
    }  # fmt: skip
