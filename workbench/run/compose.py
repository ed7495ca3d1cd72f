"""Composition of a recipe: its steps applied to lazy weights, before any tensor is computed.

A recipe whose output is an adapter and that acts beside the weights of another one is computed once, into the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.bricks.fitting import fitted, lacking
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.files import json_digest, scratch_beside
from workbench.ground.lazy import torch
from workbench.ground.manifest import publish_sealed, reusable
from workbench.merge.streaming.deltas import AlignedDeltas, Deltas, StepBricks, WeightsDelta
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.architecture import with_head_of
from workbench.models.identity import computed_on
from workbench.models.layout import Model
from workbench.recipe.methods import method
from workbench.resolve.output import MemoryAt, RouterAt, adapt, changes_result, packed
from workbench.resolve.resolved import Resolved
from workbench.run.kind import GrownStep, StepContext, StepResult, Taught, kind_of, shapes_before
from workbench.steps import MergeMethod
from workbench.weights.device import default_threads
from workbench.weights.specs import Weights

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter


@dataclass(frozen=True)
class Composition:
    """A configuration as lazy weights, with the results of its steps.

    Attributes:
        model: Weights and configuration after the last step.
        results: Results of the steps, in order.
        memory: Memory that acts on the live model.
        router: Router that chooses bricks for the live model.
    """

    model: Model
    results: Sequence[StepResult]
    memory: MemoryAt | None = None
    router: RouterAt | None = None

    @property
    def edits(self) -> dict[str, Path]:
        """Step id -> directory of the edit's adapter in the cache."""
        return {result.id: result.place for result in self.results if result.place and result.folder == "edits"}

    @property
    def trained(self) -> dict[str, Path]:
        """Step id -> directory of the brick that the step trained, in the cache."""
        return {result.id: result.place for result in self.results if result.place and result.folder == "bricks"}

    @property
    def grown(self) -> list[GrownStep]:
        """Results of the grow steps, in order."""
        return [result.grown for result in self.results if result.grown]

    @property
    def taught(self) -> list[Taught]:
        """Facts that steps have taught, in order."""
        return [result.taught for result in self.results if result.taught]

    def records(self) -> list[dict[str, object]]:
        """Return the steps' records with the methods' reports. Call this after the weights have been written."""
        return [{**result.record, **(result.report() if result.report else {})} for result in self.results]


def deltas(name: str, resolved: Resolved) -> Deltas:
    """Return the deltas of a brick on disk, in the output's vocabulary.

    Raises:
        WorkbenchError: If the brick does not fit the base.
    """
    brick, base, vocabulary = resolved.on_disk[name], resolved.base, resolved.vocabulary
    if brick.kind == "adapter":
        bound = resolved.bound(name)
        return AlignedDeltas(bound, vocabulary.delta_rows(name), vocabulary.tensors) if vocabulary else bound
    weights = fitted(brick, base, vocabulary.view(name) if vocabulary else None)
    return WeightsDelta(weights, lacking(weights))


def recipe_deltas(nested: Resolved, outer: Resolved, device: torch.device, events: Events = no_events) -> Deltas:
    """Return the deltas of a recipe used as a brick, in the output's vocabulary. The recipe is composed now, if it may be a brick."""
    check_not_grown(nested, outer)
    return WeightsDelta(_on_base(compose(nested, device, events).model, nested, outer))


def check_not_grown(nested: Resolved, outer: Resolved) -> None:
    """Check from headers that a recipe used as a brick keeps the shapes and tokens of the base.

    Raises:
        WorkbenchError: If the recipe grows the base, so that its tensors have other shapes or tokens.
    """
    planned = _on_base(shapes_before(nested, len(nested.recipe.steps)), nested, outer)
    before, after = ({name: spec.shape for name, spec in weights.specs.items()} for weights in (outer.base.weights, planned))
    if before != after or nested.tokenizer_path != nested.tokenizer_at(0):
        raise WorkbenchError(
            f"recipe {nested.recipe.name} cannot be a brick: it grows the base, so its tensors have no delta to the base's tensors",
            "Move its grow step into this recipe.",
        )


def _on_base(model: Model, nested: Resolved, outer: Resolved) -> Weights:
    """Return a nested recipe's weights with the head and, if only the outer recipe aligns tokens, the rows of the outer one's base."""
    weights = with_head_of(model.weights, outer.base.weights, model.config)
    return outer.vocabulary.on_base(weights) if outer.vocabulary is not None and nested.vocabulary is None else weights


def brick_model(name: str, resolved: Resolved, device: torch.device, events: Events = no_events) -> Model:
    """Return the model of a brick in its own shapes: a checkpoint, the base with an adapter, or a recipe's result."""
    if name in resolved.nested:
        return compose(resolved.nested[name], device, events).model
    brick, base = resolved.on_disk[name], resolved.base
    if brick.kind == "adapter":
        alone = method(MergeMethod, "task_arithmetic").model_validate({"merge": "task_arithmetic", "bricks": [name]})
        bound = deltas(name, resolved)
        return Model(MergedWeights(base, base, alone, StepBricks({name: bound})), base.config)
    if brick.part:
        return Model(brick.whole, brick.whole.config)
    return Model(resolved.vocabulary.view(name) if resolved.vocabulary else brick.checkpoint, brick.checkpoint.config)


def compose(resolved: Resolved, device: torch.device, events: Events = no_events) -> Composition:
    """Apply the recipe's steps to the base lazily. Edits are solved and bricks are trained now, unless the cache has them."""
    if resolved.recipe.fields.output.config:
        from workbench.run.configured import configured

        configured(resolved)  # a bad override is refused before any work
    current, results = resolved.base, list[StepResult]()
    memory, router = resolved.memory, resolved.router
    for number, (step, step_id) in enumerate(zip(resolved.recipe.steps, resolved.recipe.step_ids, strict=True)):
        made = kind_of(step).apply(step, step_context(resolved, number, device, events), current, results)
        for earlier in results:
            if earlier.grown:
                earlier.grown.changed(made.changed)
                if made.grown:
                    earlier.grown.renamed(made.grown.weights.growth)
        results.append(replace(made, id=step_id, record={"id": step_id, step.verb: step.name, **made.record}))
        current, memory, router = made.model, made.memory or memory, made.router or router
    if changes_result(resolved.recipe.fields.output):
        current = Model(adapt(current, resolved.base, resolved.recipe.fields.output), current.config)
    if resolved.recipe.fields.output.config:
        current = configured(resolved, current)
    if resolved.recipe.fields.output.format:
        current = Model(packed(current.weights, resolved.checkpoint, resolved.recipe.fields.output), current.config)
    return Composition(current, results, memory, router)


def step_context(resolved: Resolved, number: int, device: torch.device, events: Events = no_events) -> StepContext:
    """Return the context of one step of a recipe."""

    def brick_deltas(name: str) -> Deltas:
        if name in resolved.nested:
            return recipe_deltas(resolved.nested[name], resolved, device, events)
        return deltas(name, resolved)

    def whole_model(name: str) -> Model:
        return brick_model(name, resolved, device, events)

    def model_before() -> Model:
        output = resolved.recipe.fields.output.model_copy(update={"config": None, "format": None})
        fields = resolved.recipe.fields.model_copy(update={"output": output})
        first = replace(resolved, recipe=replace(resolved.recipe, steps=resolved.recipe.steps[:number], fields=fields))
        return compose(first, device, events).model

    def brick_adapter(name: str) -> Adapter:
        nested = resolved.nested.get(name)
        if nested is None:
            return resolved.on_disk[name].adapter
        if found := cached_adapter(nested, name, device):
            return found
        events(
            {
                "stage": "route",
                "step": resolved.recipe.step_ids[number],
                "text": f"brick '{name}': {nested.recipe.name} as an adapter",
            }
        )
        return written_adapter(nested, name, compose(nested, device, events).model, device)

    return StepContext(resolved, number, device, events, brick_deltas, brick_adapter, model_before, whole_model)


def cached_adapter(resolved: Resolved, name: str, device: torch.device | None = None) -> Adapter | None:
    """Return the adapter of a recipe from the cache; None if it has not been written yet.

    Args:
        resolved: The recipe.
        name: Name of the brick in the recipe that uses it, for messages.
        device: The device that computes it; None stands for the one that `--device auto` picks.
    """
    from workbench.adapters.read import CONFIG, Adapter

    place = _place(resolved, device)
    return Adapter(place, f"brick '{name}'") if reusable(place, CONFIG, digests=True) else None


def written_adapter(resolved: Resolved, name: str, composed: Model, device: torch.device) -> Adapter:
    """Write the adapter of a recipe, which is the brick `name` of another one, into the cache, and return it.

    Raises:
        WorkbenchError: If the result is no low-rank update of linear layers, or an input has changed.
    """
    from workbench.adapters.bind import bind
    from workbench.adapters.export import write_result
    from workbench.adapters.linear import not_linear
    from workbench.adapters.read import Adapter

    place, output = _place(resolved, device), resolved.recipe.fields.output
    with scratch_beside(place) as folder:
        partial = folder / "adapter"
        write_result(
            adapt(composed, resolved.base, output),
            partial,
            resolved.recipe.fields.base_name,
            device=device,
            threads=default_threads(),
            dtype=getattr(torch, output.dtype) if output.dtype else None,
        )
        adapter = Adapter(partial, f"brick '{name}'")
        if found := not_linear(adapter, bind(adapter, resolved.plain.weights.specs, resolved.plain)):
            raise WorkbenchError(
                f"brick '{name}': the result of recipe {resolved.recipe.name} has {found}, but only plain LoRA on linear layers can act "
                "beside the weights",
                "Leave such tensors out with `where` in the steps of that recipe, or merge adapters of linear layers only.",
            )
        resolved.check_inputs()
        publish_sealed(partial, place)
    return Adapter(place, f"brick '{name}'")


def _place(resolved: Resolved, device: torch.device | None) -> Path:
    """Return the directory of a recipe's adapter in the cache, which a device computes."""
    return resolved.cache / "adapters" / json_digest([resolved.key, computed_on(device)])
