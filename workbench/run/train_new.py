"""Training of the parameters that a grow step adds, or of the whole model that it made smaller."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import InvalidRecipeError
from workbench.files import read_json, write_json
from workbench.grow.expansion.added import new_elements
from workbench.grow.expansion.remap import GrownWeights
from workbench.lazy import torch
from workbench.models.conversion import Aligned, live_names
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.run.kind import StepContext
from workbench.steps import GrowMethod, NewTraining
from workbench.train import CROSS_ENTROPY, Objective, TrainSpec, distillation, reports, train_parameters
from workbench.train.penalties import Routing
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.saving import save_tensors
from workbench.weights.specs import load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def train_new(
    context: StepContext, step: GrowMethod, before: Model, weights: GrownWeights
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the parameters that a grow step adds, in float32. Old elements get no gradient, unless the step trains the whole model.

    Args:
        context: The context of the step.
        step: The step, after `GrowMethod.settled`.
        before: The model before the step.
        weights: The grown model's weights.

    Returns:
        Tensor -> values after training, for the tensors of `check_training`; and the record of the training.

    Raises:
        WorkbenchError: If `check_training` fails or the data are invalid.
    """
    from safetensors.torch import load_file

    assert step.train is not None
    resolved, device, at = context.resolved, context.device, context.number
    place = context.place("grown", suffix=".safetensors")
    record = read_json(place.with_suffix(".json")) if place.is_file() else None
    if record is not None:
        return load_file(place), record
    growth = weights.growth
    names, config = check_training(step, weights), growth.config
    source = resolved.tokenizer_at(at + 1)
    live = live_model(config, compute(Model(weights, config), torch.float32, device), source, device)
    masks = _all_elements(live) if step.train.whole else new_elements(live, weights, config, names)
    settings = TrainSpec(**step.train.settings(), seed=resolved.recipe.fields.seed)
    context.told("train", f"{settings.steps} steps of {settings.batch_size} rows, {_aim(step.train)}")
    with _new_alone(live, masks) as trained, _routing(step, live, weights) as penalty:
        record = train_parameters(
            settings,
            live,
            tokenizer=source,
            folder=resolved.recipe.project,
            penalty=penalty,
            told=reports(context.events, context.id),
            objective=_objective(step.train, context, before),
        )
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
    """Return the tensors that a grow step trains: those with added elements, or all.

    Args:
        step: The grow step.
        weights: The grown model's weights.

    Raises:
        WorkbenchError: If the step adds no parameters, or trains routers or uses a routing loss but adds no routers.
    """
    if step.train is None:
        return []
    routers = list(weights.growth.routers)
    field = "parameters: routers" if step.train.parameters == "routers" else "balance" if step.train.balance else "concentration"
    if not routers and (step.train.parameters == "routers" or step.train.balance or step.train.concentration):
        raise InvalidRecipeError(f"grow {step.name}: train: `{field}` needs routers, but the step adds none", "Remove the field.")
    if step.train.whole:
        return [name for name, spec in weights.specs.items() if spec.is_float]
    names = routers if step.train.parameters == "routers" else list(weights.specs)
    trained = [name for name in names if weights.added(name) is not None]
    if not trained:
        raise InvalidRecipeError(f"grow {step.name}: train: the step adds no parameters to train", "Remove `train`.")
    return trained


def _aim(training: NewTraining) -> str:
    """Return what is trained, and on what, for a line to the user."""
    if not training.whole:
        return "only new parameters"
    return "all parameters, on the distributions of the model before" if training.is_taught else "all parameters"


def _objective(training: NewTraining, context: StepContext, before: Model) -> Objective:
    """Return what the training minimizes; the model before the step is loaded in float32 if it is the teacher."""
    if not training.is_taught:
        return CROSS_ENTROPY
    device, source = context.device, context.resolved.tokenizer_at(context.number)
    return distillation(live_model(before.config, compute(before, torch.float32, device), source, device))


def _all_elements(live: PreTrainedModel) -> dict[str, Tensor | None]:
    """Return a mask for every parameter of a live model that stands for all its elements."""
    return dict.fromkeys(name for name, _ in live.named_parameters())


@contextmanager
def _routing(step: GrowMethod, live: PreTrainedModel, weights: GrownWeights) -> Iterator[Callable[[], Tensor] | None]:
    """Attach the routing losses of the step to a live model; yield the function that returns their sum, or None."""
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
    """Restrict training to new elements and yield their number. On exit, restore the old elements bit for bit."""
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
