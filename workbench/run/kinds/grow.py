"""A grow step at composition: what it needs of bricks, texts and live models, and the tensors that it and later steps leave alone."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from workbench.events import Events
from workbench.grow.expansion.remap import GrownWeights
from workbench.merge.streaming.deltas import Deltas
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.methods import methods
from workbench.resolve.resolved import Resolved
from workbench.run.kinds.train_new import check_training, train_new
from workbench.steps import GrowContext, GrowMethod, Grown, Growth, Measured, MergeMethod
from workbench.weights.specs import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class GrownStep:
    """A grow step of a composition.

    Attributes:
        id: The step's.
        step: Its method, settled.
        before: The model that it grew from.
        weights: What it made of that.
        kept: Tensor after the step -> its name now, of those that no later step has changed.
    """

    id: str
    step: GrowMethod
    before: Model
    weights: GrownWeights
    kept: dict[str, str]

    def changed(self, names: Iterable[str]) -> None:
        """A later step changes tensors, by their names now."""
        lost = set(names)
        self.kept = {old: now for old, now in self.kept.items() if now not in lost}

    def renamed(self, growth: Growth) -> None:
        """A later step grows: tensors that it takes over as they are have other names."""
        places: dict[str, str] = {}
        for name, grown in growth.tensors.items():
            if grown.verbatim:
                places.setdefault(grown.source, name)
        self.kept = {old: places[now] for old, now in self.kept.items() if now in places}


def grow(
    resolved: Resolved, step: GrowMethod, at: int, current: Model, deltas: Mapping[str, Deltas], device: torch.device, events: Events,
    trained: bool = True,
) -> tuple[Model, GrownStep, dict[str, Any]]:  # fmt: skip
    """Apply a grow step.

    Args:
        at: Its number in the recipe.
        current: The model before it.
        deltas: Of the bricks that it names.
        trained: Whether what it adds is trained, where the step asks for that.

    Returns:
        The grown model, what the step did, and its record.
    """
    growth = step.expand(current)  # what does not fit is found before anything is measured
    check_training(step, GrownWeights(current.weights, growth, base=resolved.base.weights))
    parts = _brick_weights(resolved, step, deltas)
    measured = _measure(resolved, step, at, current, parts, device, events)
    if (settled := step.settled(measured)) is not step:
        step, growth = settled, settled.expand(current)
    record = {"tensors": sum(g.new for g in growth.tensors.values()), **growth.record, **measured.record}
    made = partial(GrownWeights, current.weights, growth, resolved.recipe.fields.seed, parts, base=resolved.base.weights)
    weights = made(measured=measured.value)
    if step.train and trained:
        new, record["train"] = train_new(resolved, step, at, weights, device, events)
        weights = made(measured={**measured.value, **new})
    kept = {name: name for name in growth.tensors}
    return Model(weights, growth.config), GrownStep(resolved.recipe.step_ids[at], step, current, weights, kept), record


def _brick_weights(resolved: Resolved, step: GrowMethod, deltas: Mapping[str, Deltas]) -> dict[str, Weights]:
    """What each brick of a grow step makes of the base, by its weight."""
    found: dict[str, Weights] = {}
    for name in step.names():
        alone = methods()["merge:task_arithmetic"].model_validate(
            {"merge": "task_arithmetic", "bricks": {name: step.entry(name).model_dump(mode="json")["weight"]}}
        )
        assert isinstance(alone, MergeMethod)
        found[name] = MergedWeights(resolved.base, resolved.base, alone, {name: deltas[name]})
    return found


def _measure(
    resolved: Resolved, step: GrowMethod, at: int, current: Model, bricks: Mapping[str, Weights], device: torch.device, events: Events
) -> Measured:  # fmt: skip
    """What a grow step measures on texts and live models."""
    if not step.measures():
        return Measured({})

    def live(changes: Mapping[str, Grown]) -> PreTrainedModel:
        gc.collect()  # the model before hangs in reference cycles
        plan = Growth({name: changes.get(name, Grown(name)) for name in current.weights.specs}, current.config)
        model = Model(GrownWeights(current.weights, plan, bricks=bricks), current.config)
        return live_model(model.config, compute(model, torch.float32, device), resolved.tokenizer_at(at), device)

    def progress(done: int, total: int, text: str) -> None:
        events({"stage": "measure", "step": resolved.recipe.step_ids[at], "done": done, "total": total, "text": text})

    tokenizer = load_tokenizer(resolved.tokenizer_at(at))
    place = resolved.cache / "gates" / f"{resolved.keys[at]}.safetensors"
    return step.measure(
        current, GrowContext(live, tokenizer, device, resolved.recipe.project, place, progress, resolved.check_inputs)
    )
