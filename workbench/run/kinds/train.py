"""What steps of a recipe train, once, and keep in the cache: bricks on the current model, and the new parameters of a growth."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.bricks.brick import Brick
from workbench.bricks.card import BaseRecord, BrickCard, read_card, write_card
from workbench.events import Events
from workbench.files import json_digest, publish
from workbench.models.conversion import Aligned
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.resolve.resolved import Resolved
from workbench.steps import TrainMethod
from workbench.train import reports, train, training_texts
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.lowrank import Factors, LowRankSum
from workbench.weights.specs import Source, TensorSpec, Weights

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT = "checkpoint"


def trained_brick(resolved: Resolved, step: TrainMethod, at: int, current: Model, device: torch.device, events: Events) -> Path:
    """The directory of a step's brick: from the cache, or trained on the live current model and put there.

    As `brick train` has its base: in bfloat16 below an adapter, in float32 where all weights are trained.

    Args:
        at: The step's number in the recipe.
        current: The model before it, which is frozen.
    """
    place = resolved.cache / "bricks" / resolved.keys[at]
    if (place / "brick.yaml").is_file():
        return place
    step_id = resolved.recipe.step_ids[at]
    # Of its own, and nothing that the step's key does not have: adapters of one seed start from the same A, far from orthogonal.
    settings = step.settings(int(json_digest([resolved.recipe.fields.seed, step.id or at])[:7], 16))
    if not isinstance(settings.data, str):  # a data set that is not there is found before a model is made
        training_texts(settings, resolved.recipe.project, resolved.recipe.project)
    whole = settings.method == "full"
    # An interrupted training goes on from here.
    working = place.with_name(f".{place.name}.training")
    others = {name: brick.path for name in step.names() or () if isinstance(brick := resolved.bricks[name], Brick)}
    source = resolved.tokenizer_at(at)
    tensors = compute(current, torch.float32 if whole else torch.bfloat16, device)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    parent = weights_digest(specs, {name: tensor_digest(t) for name, t in tensors.items()}, current.config)
    live = live_model(current.config, tensors, source, device)
    live.set_attn_implementation("eager")  # of rows of a few dozen tokens the fused one's backward costs more
    events({"stage": "train", "step": step_id, "text": f"{settings.steps} steps of {settings.batch_size} rows on {device}"})
    progress, notice = reports(events, step_id)
    data = resolved.recipe.project / settings.data if isinstance(settings.data, str) else resolved.recipe.project
    record = train(
        settings, base=source, data=data, out=working / CHECKPOINT if whole else working, device=str(device), model=live, others=others,
        folder=resolved.recipe.project, declared=resolved.recipe.fields.base, progress=progress, notice=notice)  # fmt: skip
    kind = "checkpoint" if whole else "adapter"
    made = Brick(step_id, kind, working / CHECKPOINT if whole else working)
    write_card(working, BrickCard(
        version=1, name=step_id.replace("_", "-"), kind=kind, files=CHECKPOINT if whole else ".", digest=made.digest(None),
        base=BaseRecord(id=resolved.recipe.fields.base, digest=parent), training=record), made_by="workbench run", record="recipe.yaml")  # fmt: skip
    resolved.check_inputs()
    publish(working, place)  # what stands there has no card and is of no use
    return place


def with_brick(current: Model, place: Path, step: TrainMethod, device: torch.device) -> tuple[Model, list[str], dict[str, Any]]:
    """The model with a trained brick added, the tensors that it changes, and the training's record."""
    card = read_card(place)
    if card.kind == "checkpoint":
        weights: Weights = _Moved(current.weights, Aligned(Checkpoint(place / CHECKPOINT, "brick"), current.weights.specs, current.config), step.weight)  # fmt: skip
        return Model(weights, current.config), list(current.weights.specs), dict(card.training)
    bound = bind(Adapter(place, f"brick '{card.name}'"), current.weights.specs, current)
    factors = {n: Factors(step.weight * f.left, f.right) for n in bound.places if (f := bound.factors(n, device)) is not None}
    return Model(LowRankSum(current.weights, factors), current.config), list(factors), dict(card.training)


def copy_brick(place: Path, out: Path) -> None:
    """A brick from the cache into a run."""
    shutil.copytree(place, out, dirs_exist_ok=True)


class _Moved:
    """Weights, moved some of the way to others of the same names."""

    def __init__(self, current: Weights, target: Weights, weight: float) -> None:
        self._current, self._target, self._weight = current, target, weight
        self.specs = current.specs

    def origin(self, name: str) -> str | None:
        return self._current.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        if not self.specs[name].is_float:
            return self._current.open(name, device)
        return _Between(self._current.open(name, device), self._target.open(name, device), self._weight)


class _Between:
    def __init__(self, one: Source, other: Source, weight: float) -> None:
        self._one, self._other, self._weight = one, other, weight

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self._other.read(start, stop, out)
        if self._weight != 1:
            before = torch.empty_like(out)
            self._one.read(start, stop, before)
            torch.lerp(before, out, self._weight, out=out)
