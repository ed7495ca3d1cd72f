"""Steer steps: directions are measured once on the live current model, cached as a brick, and added to biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.adapters.export import SHIFT, write_adapter
from workbench.adapters.read import WEIGHTS, Adapter
from workbench.bricks.card import BaseRecord, BrickCard, write_card
from workbench.edit.steer import Steer
from workbench.ground.files import json_digest, read_json, write_json
from workbench.ground.lazy import torch
from workbench.ground.manifest import reusable
from workbench.models.identity import tokens_digest
from workbench.models.layout import Model
from workbench.recipe.recipe import dump_step
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, numel
from workbench.run.kind import Kind, StepContext, StepResult
from workbench.run.teaching import live_session
from workbench.weights.digests import tensor_digests
from workbench.weights.lowrank import Factors, LowRankSum

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "steer.json"


class SteerKind(Kind[Steer]):
    """Steps that add a direction to the bias of feed-forward output projections."""

    cached_in, record = "edits", RECORD

    def apply(self, step: Steer, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the weights with the directions added; the current ones themselves if the strength is 0."""
        step.check_model(current)
        if step.strength == 0:
            return StepResult(current, {"tensors": 0, "strength": 0.0})
        place = _measured(step, context, current)
        record = dict(read_json(place / RECORD) or {})
        shifts = _shifts(place)
        added = {
            bias: Factors(shifts[module].reshape(-1, 1), torch.ones(1, 1)) for module, bias in record["biases"].items()
        }  # a bias is a matrix with one column
        model = Model(LowRankSum(current.weights, added), current.config)
        return StepResult(model, {"tensors": len(added), **record}, added, place=place, folder="edits")

    def plan_row(
        self, step: Steer, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add a live float32 model, on which the directions are measured."""
        step.check_model(model)
        if step.strength == 0 or self.is_cached(resolved, number):
            needs.cached.append(resolved.recipe.step_ids[number])
        else:
            needs.hold(8 * numel(model))
        return {"inputs": step.inputs(), "layers": list(step.layers), "strength": step.strength}, model


KIND = SteerKind()


def _shifts(place: Path) -> dict[str, Tensor]:
    """Return module -> the direction that is added to its bias."""
    from safetensors.torch import load_file

    tensors = load_file(place / WEIGHTS)
    return {key.removeprefix(SHIFT[0]).removesuffix(SHIFT[1]): t for key, t in tensors.items() if key.endswith(SHIFT[1])}


def _measured(step: Steer, context: StepContext, current: Model) -> Path:
    """Return the directory of the directions in the cache; measure them on the live current model if it is not there."""
    resolved, place = context.resolved, context.place("edits")
    if reusable(place, RECORD, digests=True):
        return place
    context.say("edit", f"{step.name} on {context.device}")
    session = live_session(resolved, context.number, current, context.device, context.progress("edit"), rounded_to=torch.float32)
    steering = step.solve(session.context)
    base = BaseRecord(id=resolved.recipe.fields.base_name, digest=resolved.base_digest)
    with context.made(place) as partial:
        factors = dict[str, Factors]()
        for layer, shift in steering.shifts.items():
            module, zero = steering.modules[layer], Factors(torch.zeros(len(shift), 1), torch.zeros(1, steering.widths[layer]))
            factors[f"{module}.weight"] = zero.transposed() if steering.transposed else zero
            factors[f"{module}.bias"] = Factors(shift.float().view(-1, 1), torch.ones(1, 1))
        write_adapter(partial, factors, base.id, fan_in_fan_out=steering.transposed)
        made = {
            "method": step.name,
            "version": step.version,
            "step": dump_step(step),
            "base": base.digest,
            "solved_on": session.solved_on,
            "tokenizer": tokens_digest(session.tokenizer),
            "biases": {steering.modules[layer]: name for layer, name in steering.biases.items()},
        }
        write_json(partial / RECORD, {**made, **steering.record}, indent=2)
        adapter = Adapter(partial, context.id)
        fields = {
            "name": (step.id or "steer").replace("_", "-"),
            "skill": f"direction from {step.negative} to {step.positive}, strength {step.strength:g}",
            "digest": json_digest([tensor_digests(adapter.entries, None), adapter.meaning]),
            "training": {"method": step.name, "solved_on": session.solved_on, "record": RECORD},
        }
        card = BrickCard(version=1, kind="adapter", base=base, **fields)
        write_card(partial, card, made_by="workbench run", record=RECORD)
    return place
