"""Edits solved on the live current model, once, and kept as bricks in the cache."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from workbench.adapters import Adapter, write_adapter
from workbench.bricks import BaseRecord, BrickCard, write_card
from workbench.facts import write_facts
from workbench.layout import Model
from workbench.livemodels import Events, compute, live_model
from workbench.recipe import dump_step
from workbench.registry import Edit, EditMethod, MethodContext
from workbench.resolve import Resolved
from workbench.weights.digests import json_digest, tensor_digest, tensor_digests, weights_digest, write_json
from workbench.weights.writer import output_specs

RECORD, FACTS, KEYS = "edit.json", "facts.jsonl", "keys.safetensors"


def solve_edit(
    resolved: Resolved, step: EditMethod, step_id: str, key: str, current: Model, device: torch.device, events: Events
) -> Path:
    """The directory of an edit's result: from the cache, or solved on the live current model and put there."""
    place = resolved.cache / "edits" / key
    if (place / RECORD).is_file():
        return place
    from transformers import AutoTokenizer

    events({"stage": "edit", "step": step_id, "text": f"{step.name} on {device}"})
    tensors = compute(current, torch.float32, device)
    specs = output_specs(current.weights.specs, torch.float32)
    digests = {n: tensor_digest(t) for n, t in tensors.items()}
    solved_on = weights_digest(specs, digests, current.config)
    live = live_model(current.config, tensors, resolved.tokenizer_path, device)
    tokenizer = AutoTokenizer.from_pretrained(resolved.tokenizer_path, trust_remote_code=False)

    def progress(done: int, total: int, text: str) -> None:
        events({"stage": "edit", "step": step_id, "done": done, "total": total, "text": text})

    project, seed = resolved.recipe.project, resolved.recipe.fields.seed
    edit = step.solve(
        MethodContext(live, tokenizer, current, device, project, seed, progress, resolved.cache, digests))  # fmt: skip
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".solving-") as folder:
        partial = Path(folder) / "edit"
        write_edit(edit, step, partial, resolved, solved_on)
        if not place.exists():
            partial.rename(place)
    return place


def write_edit(edit: Edit, step: EditMethod, out: Path, resolved: Resolved, solved_on: str) -> None:
    """An edit as a brick: PEFT adapter, card, facts, keys and values, and the record of how it was solved."""
    fields = resolved.recipe.fields
    write_adapter(out, edit.factors, fields.base, fan_in_fan_out=edit.fan_in_fan_out)
    made = {
        "method": step.name, "version": step.version, "step": dump_step(step), "seed": fields.seed,
        "base": resolved.base_digest, "solved_on": solved_on,
    }  # fmt: skip
    write_json(out / RECORD, {**made, **edit.record}, indent=2)
    if edit.facts:
        write_facts(out / FACTS, list(edit.facts))
    if edit.tensors:
        save_file(dict(sorted(edit.tensors.items())), out / KEYS)
    name = (step.id or f"edit-{step.name}").replace("_", "-")
    digest = json_digest([tensor_digests(Adapter(out, name).entries, None), Adapter(out, name).meaning])
    card = BrickCard(
        version=1, name=name, kind="edit", skill=f"{len(edit.facts)} facts, {step.name}", digest=digest,
        base=BaseRecord(id=fields.base, digest=resolved.base_digest),
        training={"method": step.name, "solved_on": solved_on, "facts": FACTS, "record": RECORD})  # fmt: skip
    write_card(out, card, made_by="workbench run", record=RECORD)


def copy_edit(place: Path, out: Path) -> None:
    """An edit from the cache into a run, as a PEFT adapter directory."""
    shutil.copytree(place, out, dirs_exist_ok=True)
