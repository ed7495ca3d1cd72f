"""What steps of a recipe train, once, and keep in the cache: bricks on the current model, and the new parameters of a growth."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.bricks import BaseRecord, Brick, BrickCard, read_card, write_card
from workbench.conversion import Aligned, live_names
from workbench.errors import WorkbenchError
from workbench.grow.added import new_elements
from workbench.grow.remap import GrownWeights
from workbench.layout import Model
from workbench.livemodels import Events, compute, live_model
from workbench.registry import GrowMethod, TrainMethod
from workbench.resolve import Resolved
from workbench.train import TrainSpec, reports, train, train_parameters, training_texts
from workbench.train.routing import Routing
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import json_digest, read_json, tensor_digest, weights_digest, write_json
from workbench.weights.lowrank import Factors, LowRankSum
from workbench.weights.saving import publish, save_tensors
from workbench.weights.specs import Source, TensorSpec, Weights, load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

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


def train_new(
    resolved: Resolved, step: GrowMethod, at: int, weights: GrownWeights, device: torch.device, events: Events
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train what a growth has added, in float32; old elements get no gradient.

    Args:
        weights: The grown model's.

    Returns:
        Tensor -> its values after training, of tensors with additions; the training's record.

    Errors: as `check_training`, and of the data.
    """
    assert step.train is not None
    place, step_id = resolved.cache / "grown" / f"{resolved.keys[at]}.safetensors", resolved.recipe.step_ids[at]
    record = read_json(place.with_suffix(".json")) if place.is_file() else None
    if record is not None:
        return load_file(place), record
    growth = weights.growth
    names, config = check_training(step, weights), growth.config
    source = resolved.tokenizer_at(at + 1)
    live = live_model(config, compute(Model(weights, config), torch.float32, device), source, device)
    masks = new_elements(live, weights, config, names)
    settings = TrainSpec(**step.train.settings(), seed=resolved.recipe.fields.seed)
    events(
        {"stage": "train", "step": step_id, "text": f"{settings.steps} steps of {settings.batch_size} rows, what is new alone"}
    )
    progress, notice = reports(events, step_id)
    with _new_alone(live, masks) as trained, _routing(step, live, weights) as penalty:
        record = train_parameters(
            settings, live, tokenizer=source, folder=resolved.recipe.project, device=str(device), penalty=penalty,
            progress=progress, notice=notice)  # fmt: skip
    record = {"trained": trained, **record}
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".training-") as folder:
        live.save_pretrained(folder)
        saved = Aligned(Checkpoint(Path(folder), "trained"), weights.specs, config)
        tensors = {n: load(saved, n, torch.float32).reshape(weights.specs[n].shape) for n in names}
    resolved.check_inputs()
    save_tensors(tensors, place)
    write_json(place.with_suffix(".json"), record)
    return tensors, record


def check_training(step: GrowMethod, weights: GrownWeights) -> list[str]:
    """The tensors with additions that a grow step trains. Errors: nothing was added, routers or losses on routers where there are none."""
    if step.train is None:
        return []
    routers = list(weights.growth.routers)
    asked = "parameters: routers" if step.train.parameters == "routers" else "balance" if step.train.balance else "concentration"
    if not routers and (step.train.parameters == "routers" or step.train.balance or step.train.concentration):
        raise WorkbenchError(f"grow {step.name}: train: `{asked}` is of routers, and it has none", "Leave it out.", 2)
    names = routers if step.train.parameters == "routers" else list(weights.specs)
    found = [name for name in names if weights.added(name) is not None]
    if not found:
        raise WorkbenchError(f"grow {step.name}: train: the step adds nothing that could be trained", "Leave `train` out.", 2)
    return found


@contextmanager
def _routing(step: GrowMethod, live: PreTrainedModel, weights: GrownWeights) -> Iterator[Callable[[], Tensor] | None]:
    """The losses on routers that the step asks for."""
    assert step.train is not None
    if not (step.train.balance or step.train.concentration):
        yield None
        return
    growth = weights.growth
    places = live_names(growth.config, weights.specs)
    routers = [places[name][0].removesuffix(".weight") for name in growth.routers]
    routing = Routing(live, routers, step.train.balance, step.train.concentration)
    try:
        yield routing.penalty
    finally:
        routing.remove()


@contextmanager
def _new_alone(live: PreTrainedModel, masks: Mapping[str, Tensor | None]) -> Iterator[int]:
    """Only new elements have gradients while this is open; gives their number. Afterwards old elements are the bits that they were."""
    hooks, old, count = [], {}, 0
    for name, parameter in live.named_parameters():
        parameter.requires_grad_(name in masks)
        mask = masks.get(name)
        count += 0 if name not in masks else parameter.numel() if mask is None else int(mask.sum())
        if mask is not None:
            old[name] = parameter.detach().clone()
            hooks.append(parameter.register_hook(partial(torch.mul, mask)))
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, values in old.items():
                parameter = live.get_parameter(name)
                parameter.copy_(torch.where(masks[name], parameter, values))  # type: ignore[arg-type]
