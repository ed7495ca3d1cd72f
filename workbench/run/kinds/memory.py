"""A memory step at composition: facts learned on the live model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from workbench.events import Events
from workbench.facts import write_facts
from workbench.facts.credibility import Credibility
from workbench.facts.log import ADD, RECIPE, append, lines_of
from workbench.files import publish, write_json
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.recipe import dump_step
from workbench.resolve.resolved import Resolved
from workbench.run.memories import FACTS, RECORD, _save_tensors
from workbench.steps import MemoryMethod, MethodContext, Remembered
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.writer import output_specs


def solve_memory(
    resolved: Resolved, step: MemoryMethod, step_id: str, key: str, current: Model, device: torch.device, events: Events
) -> Path:
    """The directory of a memory: from the cache, or learned on the live current model and put there."""
    place = resolved.cache / "memories" / key
    if (place / RECORD).is_file():
        return place
    events({"stage": "edit", "step": step_id, "text": f"{step.name} on {device}"})

    def progress(done: int, total: int, text: str) -> None:
        events({"stage": "edit", "step": step_id, "done": done, "total": total, "text": text})

    context, solved_on = live_context(resolved, current, device, progress)
    memory = step.solve(context)
    fresh = Credibility(1, 1, True, (), step.alpha, step.decay, step.floor)
    step.check_together([Remembered(fact, memory.tensors[fact.id], fresh) for fact in memory.facts])
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".solving-") as folder:
        partial = Path(folder) / "memory"
        partial.mkdir()
        append(partial, 1, lines_of(ADD, memory.facts, RECIPE, None))
        write_facts(partial / FACTS, sorted(memory.facts, key=lambda fact: fact.id))
        _save_tensors(partial, 1, memory)
        write_json(partial / RECORD, {
            "format": 1, "method": step.name, "method_version": step.version, "step": dump_step(step), "settings": memory.settings,
            "seed": context.seed, "base": resolved.base_digest, "solved_on": solved_on, "record": memory.record}, indent=2)  # fmt: skip
        resolved.check_inputs()
        if not place.exists():
            publish(partial, place)
    return place


def live_context(resolved: Resolved, current: Model, device: torch.device, progress: Any) -> tuple[MethodContext, str]:
    """The live model that a memory is learned on, and its weights' digest: the weights as they are written, in float32."""
    written = compute(current, resolved.dtype, device)
    digests = {name: tensor_digest(tensor) for name, tensor in written.items()}
    solved_on = weights_digest(output_specs(current.weights.specs, resolved.dtype), digests, current.config)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in written.items()}
    live = live_model(current.config, tensors, resolved.tokenizer_path, device)
    tokenizer = load_tokenizer(resolved.tokenizer_path)
    project, seed = resolved.recipe.project, resolved.recipe.fields.seed
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return MethodContext(live, tokenizer, current, device, project, seed, progress, resolved.cache, digests), solved_on
