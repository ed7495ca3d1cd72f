"""Edit steps: an edit is solved once on the live current model, then cached as a brick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.adapters.bind import BoundAdapter, bind
from workbench.adapters.export import write_adapter
from workbench.adapters.live import live_places
from workbench.adapters.read import Adapter
from workbench.bricks.card import BaseRecord, BrickCard, write_card
from workbench.edit.closed_form.continuing import HISTORY, STREAM
from workbench.facts.facts import FACTS, Fact, write_facts
from workbench.facts.published import read_facts
from workbench.ground.files import file_digest, json_digest, read_json, write_json
from workbench.ground.lazy import torch
from workbench.ground.manifest import changing, reusable
from workbench.models.identity import tokens_digest, vocabulary_digest
from workbench.models.layout import Model
from workbench.recipe.recipe import dump_step
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, cost_row, numel, seconds_of
from workbench.run.kind import Kind, StepContext, StepResult, Taught
from workbench.run.record import FactsSaid
from workbench.run.teaching import LiveSession, is_counted, live_session
from workbench.steps import Edit, EditMethod
from workbench.vocabulary.tokens import reading_bytes
from workbench.weights.digests import tensor_digests
from workbench.weights.header import save_tensors
from workbench.weights.lowrank import Factors, LowRankSum
from workbench.weights.specs import TensorSpec

RECORD, KEYS = "edit.json", "keys.safetensors"


class EditKind(Kind[EditMethod]):
    """Steps that teach facts by a low-rank update of the current weights."""

    cached_in, record = "edits", RECORD

    def apply(self, step: EditMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the weights with the edit. It is solved on a live model now, unless the cache has it."""
        step.check_model(current)
        place = _solved(step, context, current, earlier)
        edit = bind(Adapter(place, f"edit '{context.id}'"), current.weights.specs, current)
        factors = {name: _factors(edit, name, current.weights.specs[name], context.device) for name in edit.places}
        model = Model(LowRankSum(current.weights, factors), current.config)
        record = {"tensors": len(factors), **(read_json(place / RECORD) or {})}
        taught = Taught(context.id, context.number, model, edit_facts(place))
        return StepResult(model, record, factors, place=place, folder="edits", taught=taught)

    def plan_row(
        self, step: EditMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add a live float32 model, and the time that the method's tokens take."""
        step.check_model(model)
        row: dict[str, object] = {"inputs": step.inputs()}
        cached, memory = self.is_cached(resolved, number), 0
        if cached:
            needs.cached.append(resolved.recipe.step_ids[number])
        else:
            cost = step.cost(model, resolved.recipe.project, resolved.cache)
            memory = cost.pop("memory", 0)
            seconds = seconds_of(cost, numel(model), passes=1)
            row |= cost_row(cost, seconds)
            needs.seconds += seconds
        if not cached or not is_counted(resolved, number):  # counting its facts needs a live model
            needs.hold(8 * numel(model) + reading_bytes(resolved.base_path) + memory)
        return row, model

    def keep(self, result: StepResult, run: Path, said: FactsSaid | None) -> None:
        """Copy the edit, a PEFT adapter directory, into the run directory, and add the counts of its facts to its record."""
        super().keep(result, run, said)
        record = run / result.folder / result.id / RECORD
        if said is not None:
            with changing(record.parent, [RECORD]):
                write_json(record, {**(read_json(record) or {}), "said": said.to_dict()}, indent=2)


KIND = EditKind()


def _factors(edit: BoundAdapter, name: str, spec: TensorSpec, device: torch.device) -> Factors:
    """Return an edit's update of a tensor; that of a bias, which is a matrix with one column, is a product of rank 1."""
    product = edit.factors(name, device)
    if product is None:
        assert len(spec.shape) == 1, "an edit is a product of factors, or the shift of a bias"
        shift = torch.zeros(spec.rows, 1, device=device)
        edit.open_delta(name, device).read_delta(0, spec.rows, torch.zeros_like(shift), shift)
        product = Factors(shift, torch.ones(1, 1, device=device))
    return product


def _solved(step: EditMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> Path:
    """Return the directory of an edit in the cache; solve the edit on the live current model if it is not there."""
    resolved, place = context.resolved, context.place("edits")
    if reusable(place, RECORD, digests=True):
        return place
    context.say("edit", f"{step.name} on {context.device}")
    session = live_session(resolved, context.number, current, context.device, context.progress("edit"), rounded_to=torch.float32)
    edits = [result.place for result in earlier if result.place and result.folder == "edits"]
    edit = step.solve(replace(session.context, earlier=edits))
    with context.made(place) as partial:
        write_edit(edit, step, partial, session)
    return place


def write_edit(
    edit: Edit,
    step: EditMethod,
    out: Path,
    on: LiveSession,
    card: Mapping[str, Any] | None = None,
    made_by: str = "workbench run",
) -> None:
    """Write an edit as a brick: PEFT adapter, card, facts, keys and values, and the record of how it was solved.

    Args:
        edit: The edit.
        step: The step, whose fields go into the record.
        out: A new directory.
        on: The live model that it was solved on.
        card: Fields of the card that replace the defaults, such as the name, the base's id and the license.
        made_by: The command that writes it, for the card.
    """
    resolved = on.resolved
    base = BaseRecord(**{"id": resolved.recipe.fields.base_name, "digest": resolved.base_digest, **(card or {}).get("base", {})})
    mixture = live_places(resolved.base).mixture
    write_adapter(out, edit.factors, base.id, fan_in_fan_out=edit.fan_in_fan_out, mixture=mixture)
    made = {
        "method": step.name,
        "version": step.version,
        "step": dump_step(step),
        "min_efficacy": step.min_efficacy,
        "seed": on.context.seed,
        "base": base.digest,
        "solved_on": on.solved_on,
        "solved_after": on.after,
        "vocabulary": vocabulary_digest(on.tokenizer),
        "tokenizer": tokens_digest(on.tokenizer),
    }
    write_json(out / RECORD, {**made, **edit.record, **_write_history(edit, out)}, indent=2)
    if edit.facts:
        write_facts(out / FACTS, list(edit.facts))
    if edit.tensors:
        save_tensors(dict(sorted(edit.tensors.items())), out / KEYS)
    name = (step.id or f"edit-{step.name}").replace("_", "-")
    digest = json_digest([tensor_digests(Adapter(out, name).entries, None), Adapter(out, name).meaning])
    fields = {"name": name, "skill": f"{len(edit.facts)} facts, {step.name}", **(card or {}), "base": base}
    training = {"method": step.name, "solved_on": on.solved_on, "facts": FACTS, "record": RECORD}
    write_card(out, BrickCard(version=1, kind="edit", digest=digest, training=training, **fields), made_by=made_by, record=RECORD)


def _write_history(edit: Edit, out: Path) -> dict[str, object]:
    """Write what a later run needs to continue the edit's stream, and return the record's entry for it."""
    if not edit.stream:
        return {}
    write_facts(out / STREAM, list(edit.stream))
    save_tensors(dict(sorted(edit.history.items())), out / HISTORY)
    files = {"file": HISTORY, "bytes": (out / HISTORY).stat().st_size, "digest": file_digest(out / HISTORY)}
    history = edit.record["history"]
    assert isinstance(history, Mapping), "a method that has a stream records its history"
    return {"history": {**history, **files, "stream": file_digest(out / STREAM)}}


def edit_facts(place: Path) -> list[Fact]:
    """Return the facts that an edit was solved for."""
    file = place / FACTS
    return read_facts(file, str(file)) if file.is_file() else []
