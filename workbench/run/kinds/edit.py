"""Edits solved on the live current model, once, and kept as bricks in the cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.adapters.export import write_adapter
from workbench.adapters.read import Adapter
from workbench.bricks.brick import vocabulary_digest
from workbench.bricks.card import BaseRecord, BrickCard, write_card
from workbench.events import Events
from workbench.facts import Fact, read_facts, write_facts
from workbench.files import json_digest, publish, read_json, write_json
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.recipe import dump_step
from workbench.resolve.resolved import Resolved
from workbench.steps import Edit, EditMethod, MethodContext
from workbench.weights.digests import tensor_digest, tensor_digests, weights_digest
from workbench.weights.saving import save_tensors
from workbench.weights.writer import output_specs

RECORD, FACTS, KEYS = "edit.json", "facts.jsonl", "keys.safetensors"


@dataclass(frozen=True)
class Solvable:
    """A configuration as a live model that edits are solved on.

    Attributes:
        resolved: The recipe that it comes from.
        context: The live float32 model, its tokenizer, and what an edit method may use beside them.
        solved_on: Digest of the weights in float32 and the configuration.
        tokenizer: Its tokenizer's directory.
        after: Key of the configuration: what recipes with the same steps derive without reading its weights.
    """

    resolved: Resolved
    context: MethodContext
    solved_on: str
    tokenizer: Path
    after: str


def solvable(
    resolved: Resolved, steps: int, current: Model, device: torch.device, events: Events, name: str, seed: int | None = None
) -> Solvable:
    """The live model of a configuration.

    Args:
        resolved: A recipe.
        steps: How many of its steps have made `current`.
        current: The configuration.
        device: Where the model goes.
        events: Told of progress, as stage "edit".
        name: How they call it.
        seed: Of what is random; omitted: the recipe's.
    """
    tensors = compute(current, torch.float32, device)
    digests = {n: tensor_digest(t) for n, t in tensors.items()}
    solved_on = weights_digest(output_specs(current.weights.specs, torch.float32), digests, current.config)
    source = resolved.tokenizer_at(steps)
    live = live_model(current.config, tensors, source, device)
    tokenizer = load_tokenizer(source)

    def progress(done: int, total: int, text: str) -> None:
        events({"stage": "edit", "step": name, "done": done, "total": total, "text": text})

    seed = resolved.recipe.fields.seed if seed is None else seed
    context = MethodContext(live, tokenizer, current, device, resolved.recipe.project, seed, progress, resolved.cache, digests)
    return Solvable(resolved, context, solved_on, source, resolved.state(steps))


def solve_edit(resolved: Resolved, step: EditMethod, number: int, current: Model, device: torch.device, events: Events) -> Path:
    """The directory of an edit's result: from the cache, or solved on the live current model and put there.

    Args:
        resolved: The recipe.
        step: The step, the recipe's `number`th, counted from 0.
        current: What the steps before it have made.
        device: Where it is solved.
        events: Told of progress.
    """
    place = resolved.cache / "edits" / resolved.keys[number]
    if (place / RECORD).is_file():
        return place
    step_id = resolved.recipe.step_ids[number]
    events({"stage": "edit", "step": step_id, "text": f"{step.name} on {device}"})
    on = solvable(resolved, number, current, device, events, step_id)
    edit = step.solve(on.context)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".solving-") as folder:
        partial = Path(folder) / "edit"
        write_edit(edit, step, partial, on)
        resolved.check_inputs()
        if not place.exists():
            publish(partial, place)
    return place


def write_edit(
    edit: Edit, step: EditMethod, out: Path, on: Solvable, card: Mapping[str, Any] | None = None, made_by: str = "workbench run"
) -> None:
    """An edit as a brick: PEFT adapter, card, facts, keys and values, and the record of how it was solved.

    Args:
        edit: The edit.
        step: Its settings, as the record keeps them.
        out: A new directory.
        on: What it was solved on.
        card: Fields of the card that differ from what the step says: its name, the base's id, its licence.
        made_by: The command that writes it.
    """
    resolved = on.resolved
    base = BaseRecord(**{"id": resolved.recipe.fields.base, "digest": resolved.base_digest, **(card or {}).get("base", {})})
    write_adapter(out, edit.factors, base.id, fan_in_fan_out=edit.fan_in_fan_out)
    made = {
        "method": step.name, "version": step.version, "step": dump_step(step), "min_efficacy": step.min_efficacy,
        "seed": on.context.seed,
        "base": base.digest, "solved_on": on.solved_on, "solved_after": on.after,
        "vocabulary": vocabulary_digest(on.tokenizer),
    }  # fmt: skip
    write_json(out / RECORD, {**made, **edit.record}, indent=2)
    if edit.facts:
        write_facts(out / FACTS, list(edit.facts))
    if edit.tensors:
        save_tensors(dict(sorted(edit.tensors.items())), out / KEYS)
    name = (step.id or f"edit-{step.name}").replace("_", "-")
    digest = json_digest([tensor_digests(Adapter(out, name).entries, None), Adapter(out, name).meaning])
    fields = {"name": name, "skill": f"{len(edit.facts)} facts, {step.name}", **(card or {}), "base": base}
    training = {"method": step.name, "solved_on": on.solved_on, "facts": FACTS, "record": RECORD}
    write_card(out, BrickCard(version=1, kind="edit", digest=digest, training=training, **fields), made_by=made_by, record=RECORD)


def edit_facts(place: Path) -> list[Fact]:
    """Return the facts that an edit was solved for."""
    file = place / FACTS
    return read_facts(file, str(file)) if file.is_file() else []


def copy_edit(place: Path, out: Path, said: Mapping[str, Any] | None = None) -> None:
    """Copy an edit from the cache into a run, as a PEFT adapter directory.

    Args:
        place: Where it is.
        out: Where it goes.
        said: How many of its facts the model says, for its record.
    """
    shutil.copytree(place, out, dirs_exist_ok=True)
    if said is not None:
        write_json(out / RECORD, {**(read_json(out / RECORD) or {}), "said": said}, indent=2)
