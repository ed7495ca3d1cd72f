"""Training steps: a brick is trained once on the current model, then cached."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.bricks.brick import Brick
from workbench.bricks.card import BaseRecord, BrickCard, read_card, write_card
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.ground.manifest import publish_sealed, reusable
from workbench.models.layout import Model
from workbench.models.live import Aligned, compute, live_model
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, cost_row, numel, seconds_of
from workbench.run.kind import Kind, StepContext, StepResult
from workbench.steps import TrainMethod
from workbench.train.fit import reports
from workbench.train.rows import CROSS_ENTROPY, Objective
from workbench.train.run import TrainFiles, train
from workbench.train.spec import TrainSpec
from workbench.train.texts import training_texts
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.lowrank import Factors, LowRankSum
from workbench.weights.specs import Source, TensorSpec, Weights

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT, CARD = "checkpoint", "brick.yaml"
T = TypeVar("T", bound=TrainMethod)


class TrainKind(Kind[T]):
    """Steps that train a brick on the frozen current model and add it."""

    cached_in, record = "bricks", CARD

    def objective(self, step: T, context: StepContext, current: Model, settings: TrainSpec) -> Objective:
        """Return what the training minimizes. It is called before the model that is trained is loaded."""
        return CROSS_ENTROPY

    def apply(self, step: T, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the weights with the brick added. It is trained now, unless the cache has it."""
        place = self._trained(step, context, current)
        model, names, record = _with_brick(step, context, current, place)
        return StepResult(model, {"tensors": len(names), "training": record}, names, place=place, folder="bricks")

    def plan_row(self, step: T, resolved: Resolved, number: int, model: Model, needs: Needs) -> tuple[dict[str, object], Model]:
        """Add the memory of the live model and its optimizer, and the seconds of the training."""
        row: dict[str, object] = {"inputs": step.inputs()}
        if self.is_cached(resolved, number):
            needs.cached.append(resolved.recipe.step_ids[number])
            return row, model
        settings = step.settings(0)
        if not isinstance(settings.data, str):
            row["trains_on"] = settings.data.hub
        cost = step.cost(resolved.recipe.project)
        seconds = seconds_of(cost, numel(model), passes=3)
        row |= cost_row(cost, seconds)
        needs.hold((20 if settings.method == "full" else 8) * numel(model))
        needs.seconds += seconds
        return row, model

    def _trained(self, step: T, context: StepContext, current: Model) -> Path:
        """Return the directory of the step's brick in the cache; train it on the live current model if it is not there.

        The base has the same dtype as in `brick train`.
        """
        resolved, place = context.resolved, context.place("bricks")
        if reusable(place, CARD, digests=True):
            return place
        step_id, device = context.id, context.device
        # Each step has its own seed, because adapters with the same seed start from the same A and are far from orthogonal.
        settings = step.settings(int(json_digest([resolved.recipe.fields.seed, step.id or context.number])[:7], 16))
        if not isinstance(settings.data, str):  # find a missing data set before the model is loaded
            training_texts(settings, resolved.recipe.project, resolved.recipe.project)
        objective = self.objective(step, context, current, settings)
        whole = settings.method == "full"
        # An interrupted training resumes from this directory.
        working = place.with_name(f".{place.name}.training")
        others = {name: resolved.on_disk[name].path for name in settings.orthogonal_to if name in resolved.on_disk}
        source = resolved.tokenizer_at(context.number)
        tensors = compute(current, settings.weights_dtype, device)
        specs = {name: TensorSpec.of(t.shape, t.dtype) for name, t in tensors.items()}
        parent = weights_digest(specs, {name: tensor_digest(t) for name, t in tensors.items()}, current.config)
        live = live_model(current.config, tensors, source, device)
        live.set_attn_implementation("eager")  # faster backward than fused attention for rows of a few dozen tokens
        data = resolved.recipe.project / settings.data if isinstance(settings.data, str) else resolved.recipe.project
        record = train(
            settings,
            TrainFiles(
                base=source,
                data=data,
                out=working / CHECKPOINT if whole else working,
                folder=resolved.recipe.project,
                others=others,
                declared=resolved.recipe.fields.base_name,
            ),
            device=str(device),
            model=live,
            callbacks=reports(context.events, step_id),
            objective=objective,
        )
        kind = "checkpoint" if whole else "adapter"
        made = Brick(step_id, kind, working / CHECKPOINT if whole else working)
        card = BrickCard(
            version=1,
            name=step_id.replace("_", "-"),
            kind=kind,
            files=CHECKPOINT if whole else ".",
            digest=made.digest(None),
            base=BaseRecord(id=resolved.recipe.fields.base_name, digest=parent),
            training=record,
        )
        write_card(working, card, made_by="workbench run", record="recipe.yaml")
        resolved.check_inputs()
        publish_sealed(working, place)
        shutil.rmtree(working, ignore_errors=True)  # another process was first
        return place


KIND = TrainKind[TrainMethod]()


def _with_brick(
    step: TrainMethod, context: StepContext, current: Model, place: Path
) -> tuple[Model, list[str], dict[str, object]]:
    """Return the model with a trained brick added, the tensors that it changes, and the record of the training."""
    card = read_card(place)
    if card.kind == "checkpoint":
        tuned = Aligned(Checkpoint(place / CHECKPOINT, "brick"), current.weights.specs, current.config)
        weights: Weights = _Moved(current.weights, tuned, step.factor)
        return Model(weights, current.config), list(current.weights.specs), dict(card.training)
    bound = bind(Adapter(place, f"brick '{card.name}'"), current.weights.specs, current)
    factors = {
        n: Factors(step.factor * f.left, f.right) for n in bound.places if (f := bound.factors(n, context.device)) is not None
    }
    return Model(LowRankSum(current.weights, factors), current.config), list(factors), dict(card.training)


class _Moved:
    """Linear interpolation from the current weights to the trained weights."""

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
