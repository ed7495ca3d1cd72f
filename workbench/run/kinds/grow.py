"""Grow steps: plans, measurements on live models, checks, and training of the parameters that a step adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from workbench.ground.errors import InvalidRecipeError
from workbench.ground.files import read_memo, scratch_beside, write_memo
from workbench.ground.lazy import torch
from workbench.grow.expansion.preserve import TOKENS
from workbench.grow.expansion.remap import GrownWeights, new_elements
from workbench.grow.expansion.streamed import streamed_bytes
from workbench.merge.streaming.deltas import StepBricks
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.models.live import Aligned, compute, live_model, live_names
from workbench.models.prompts import load_tokenizer
from workbench.recipe.methods import method
from workbench.resolve.resolved import Resolved
from workbench.run.check_growth import compare
from workbench.run.costs import CHECKED, FLOPS_PER_SECOND, LEARNED, Needs, cost_row, largest, numel, seconds_of
from workbench.run.kind import GrownStep, Kind, StepContext, StepResult, place_of, shapes_of_brick
from workbench.steps import GrowContext, GrowMethod, Grown, Growth, Measured, MergeMethod, NewTraining, Sources
from workbench.train.fit import reports
from workbench.train.penalties import Routing
from workbench.train.rows import CROSS_ENTROPY, Objective, distillation
from workbench.train.run import train_parameters
from workbench.train.spec import TrainSpec
from workbench.train.texts import training_cost
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.device import free_models
from workbench.weights.header import is_whole, save_tensors
from workbench.weights.specs import Weights, load
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Grow(Kind[GrowMethod]):
    """Steps that add parameters."""

    def apply(self, step: GrowMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the grown model. If the step has `train`, the added parameters are trained now, unless the cache has them."""
        model, grown, record = _grown(step, context, current)
        return StepResult(model, record, grown=grown)

    def shapes(self, step: GrowMethod, resolved: Resolved, model: Model) -> Model:
        """Return the grown model's names, shapes and configuration."""
        step = _with_shapes(step, resolved)
        growth = step.expand(model)
        weights = GrownWeights(model.weights, growth, base=resolved.base.weights)
        check_training(step, weights)
        return Model(weights, growth.config)

    def plan_row(
        self, step: GrowMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add the bytes of bricks and checks, and the memory of live models."""
        step = _with_shapes(step, resolved)
        growth, before = step.expand(model), numel(model)
        row: dict[str, object] = dict(growth.record)
        if names := step.names():
            row["bricks"] = {name: resolved.bricks[name].kind for name in names}
            needs.read += sum(resolved.bricks[name].input_bytes for name in names)
        if files := step.files():
            row["inputs"] = list(dict.fromkeys(files))
        _add_merges(growth, needs)
        weights = GrownWeights(model.weights, growth, base=resolved.base.weights)
        check_training(step, weights)
        grown = Model(weights, growth.config)
        after = numel(grown)
        if step.measures() or step.builds:
            needs.hold(8 * before if step.measures() else 0)
        if step.check != "off":
            row["check"] = step.check
            _add_check(step, resolved, model, grown, needs)
        if step.train:
            row["trains_on"] = step.train.data
            if not self.is_cached(resolved, number):
                cost = training_cost(TrainSpec(**step.train.settings()), resolved.recipe.project)
                teacher = before if step.train.is_taught else 0
                seconds = round(seconds_of(cost, after, passes=3) + seconds_of(cost, teacher, passes=1), 1)
                row |= cost_row(cost, seconds)
                needs.seconds += seconds
                # Weights, gradients, Adam's two moments, and a copy while it is loaded; the weights of the teacher.
                needs.hold(20 * after + 4 * teacher)
        needs.whole = max(needs.whole, weights.held_bytes)
        return row, grown

    def is_cached(self, resolved: Resolved, number: int) -> bool:
        """Return True if the trained parameters are in the cache."""
        return not resolved.headers_only and is_whole(place_of(resolved, "grown", number, suffix=".safetensors"))

    def check(self, step: GrowMethod, context: StepContext) -> dict[str, object] | None:
        """Compare the grown model with the model before the step, as its `check` requests; return None for `check: off`."""
        if step.check == "off":
            return None
        known = context.place("growth", suffix=".json")
        record = read_memo(known)
        if record is None:
            current = context.model_before()
            model, grown, _ = _grown(step, context, current, trained=False)
            record = compare(context, grown, current, model)
            write_memo(known, record)
        return dict(record)


KIND = Grow()


def _add_check(step: GrowMethod, resolved: Resolved, model: Model, grown: Model, needs: Needs) -> None:
    """Add the bytes that the check reads, its seconds and its live models to `needs`."""
    before, after = numel(model), numel(grown)
    written = sum(s.nbytes for s in output_specs(grown.weights.specs, resolved.dtype_name).values())
    needs.read += written
    if step.composes:  # only the written files are checked
        needs.hold(0)
    elif step.is_checked():
        # Both models, gradients, and a copy while loading: measured 3.7 GB for growth from 134 to 226 million parameters. The loss and its
        # gradient take five times the logits: measured 0.23 GB for a vocabulary of 256,000.
        needs.hold(4 * before + 12 * after + 5 * grown.logits_bytes(2 * TOKENS))
        needs.seconds += 2 * (before * CHECKED + after * (CHECKED + LEARNED)) / FLOPS_PER_SECOND
    else:  # logits of two short prompts, both models streamed
        needs.hold(max(streamed_bytes(m) for m in (model, grown)) + 2 * grown.logits_bytes(2 * TOKENS))
        needs.read += sum(s.nbytes for m in (model, grown) for s in m.weights.specs.values())
    if step.check == "full":
        needs.hold(2 * written)  # the written model, loaded by transformers
        needs.seconds += 2 * 2 * after * CHECKED / FLOPS_PER_SECOND


def _grown(
    step: GrowMethod, context: StepContext, current: Model, trained: bool = True
) -> tuple[Model, GrownStep, dict[str, object]]:
    """Return the grown model, the result of the step, and its record."""
    resolved = context.resolved
    step = _with_models(step, context)
    growth = step.expand(current)  # find errors before the expensive measurement
    check_training(step, GrownWeights(current.weights, growth, base=resolved.base.weights))
    bricks = _brick_weights(context, step)
    measured = _measured(context, step, current, bricks)
    if (settled := step.settled(measured)) is not step:
        step, growth = settled, settled.expand(current)
    record = {"tensors": sum(g.new for g in growth.tensors.values()), **growth.record, **measured.record}
    made = partial(GrownWeights, current.weights, growth, context.seed, bricks, base=resolved.base.weights)
    weights = made(measured=measured.value)
    if step.train and trained:
        new, record["train"] = train_new(context, step, current, weights)
        weights = made(measured={**measured.value, **new})
    kept = {name: name for name in growth.tensors}
    return Model(weights, growth.config), GrownStep(context.id, step, current, weights, kept), record


def _add_merges(growth: Growth, needs: Needs) -> None:
    """Add the memory of the merges within a growth to `needs`."""
    for model in growth.models.values():
        if isinstance(merged := model.weights, MergedWeights):
            count = len(merged.bricks)
            needs.width = max(needs.width, count)
            sizes = [merged.method.tensor_bytes(model, name, count) for name in merged.specs]
            needs.whole = max(needs.whole, largest(sizes, needs.threads))


def _with_shapes(step: GrowMethod, resolved: Resolved) -> GrowMethod:
    """Return the step with the shapes of the whole models that it reads."""
    names = step.whole_models()
    return step.with_sources(Sources({name: shapes_of_brick(resolved, name) for name in names})) if names else step


def _with_models(step: GrowMethod, context: StepContext) -> GrowMethod:
    """Return the step with the whole models that it reads, as lazy weights."""
    names = step.whole_models()
    if not names:
        return step
    resolved = context.resolved
    models = {name: context.whole_model(name) for name in names}
    return step.with_sources(Sources(models, resolved.fingerprints, lambda: resolved.digests, context.seed))


def _brick_weights(context: StepContext, step: GrowMethod) -> dict[str, Weights]:
    """Return for each brick of the step the base plus the brick's weighted delta."""
    base = context.resolved.base
    weights: dict[str, Weights] = {}
    for name in [name for name in step.names() if name not in step.whole_models()]:
        scaled = {name: step.entry(name).model_dump(mode="json")["weight"]}
        alone = method(MergeMethod, "task_arithmetic").model_validate({"merge": "task_arithmetic", "bricks": scaled})
        weights[name] = MergedWeights(base, base, alone, StepBricks({name: context.deltas(name)}))
    return weights


def _measured(context: StepContext, step: GrowMethod, current: Model, bricks: Mapping[str, Weights]) -> Measured:
    """Return the method's measurement on texts and live models; empty if it makes none."""
    if not step.measures():
        return Measured({})
    resolved, device = context.resolved, context.device
    source = resolved.tokenizer_at(context.number)

    def live(changes: Mapping[str, Grown]) -> PreTrainedModel:
        free_models(current.weights)
        plan = Growth({name: changes.get(name, Grown(name)) for name in current.weights.specs}, current.config)
        model = Model(GrownWeights(current.weights, plan, bricks=bricks), current.config)
        return live_model(model.config, compute(model, torch.float32, device), source, device)

    tokenizer = load_tokenizer(source)
    place = context.place("gates", suffix=".safetensors")
    progress = context.progress("measure")
    tools = GrowContext(live, tokenizer, device, resolved.recipe.project, place, progress, resolved.check_inputs)
    return step.measure(current, tools)


def train_new(
    context: StepContext, step: GrowMethod, before: Model, weights: GrownWeights
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Train the parameters that a grow step adds, in float32. Old elements get no gradient, unless the step trains the whole model.

    Returns:
        Tensor -> values after training, for the tensors of `check_training`; and the record of the training.

    Raises:
        WorkbenchError: If `check_training` fails or the data are invalid.
    """
    from safetensors.torch import load_file

    assert step.train is not None
    resolved, device, at = context.resolved, context.device, context.number
    place = context.place("grown", suffix=".safetensors")
    record = read_memo(place.with_suffix(".json")) if is_whole(place) else None
    if record is not None:
        return load_file(place), record
    growth = weights.growth
    names, config = check_training(step, weights), growth.config
    source = resolved.tokenizer_at(at + 1)
    live = live_model(config, compute(Model(weights, config), torch.float32, device), source, device)
    masks = dict.fromkeys(dict(live.named_parameters())) if step.train.whole else new_elements(live, weights, config, names)
    settings = TrainSpec(**step.train.settings(), seed=resolved.recipe.fields.seed)
    context.say("train", f"{settings.steps} steps of {settings.batch_size} rows, {_aim(step.train)}")
    with _new_alone(live, masks) as trained, _routing(step, live, weights) as penalty:
        record = train_parameters(
            settings,
            live,
            tokenizer=source,
            folder=resolved.recipe.project,
            penalty=penalty,
            callbacks=reports(context.events, context.id),
            objective=_objective(step.train, context, before),
        )
    record = {"trained": trained, **record}
    with scratch_beside(place) as folder:
        live.save_pretrained(folder)
        saved = Aligned(Checkpoint(folder, "trained"), weights.specs, config)
        tensors = {n: load(saved, n, torch.float32).reshape(weights.specs[n].shape) for n in names}
    resolved.check_inputs()
    save_tensors(tensors, place)
    write_memo(place.with_suffix(".json"), record)
    return tensors, record


def check_training(step: GrowMethod, weights: GrownWeights) -> list[str]:
    """Return the tensors that a grow step trains: those with added elements, or all.

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
