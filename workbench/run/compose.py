"""Steps applied to lazy weights: what a resolved recipe means, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.bricks.brick import Brick, fitted
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.facts import Fact
from workbench.files import read_json
from workbench.merge.streaming.deltas import Deltas
from workbench.merge.streaming.difference import WeightsDelta
from workbench.merge.streaming.merged import MergedWeights
from workbench.merge.streaming.realigned import AlignedDeltas
from workbench.models.layout import Model
from workbench.models.tied import with_head_of
from workbench.resolve.adapter_form import adapt, changes_result
from workbench.resolve.resolved import MemoryAt, Resolved
from workbench.run.kinds.edit import edit_facts, solve_edit
from workbench.run.kinds.grow import GrownStep, grow
from workbench.run.kinds.memory import solve_memory
from workbench.run.kinds.merge import check_reach, measure
from workbench.run.kinds.train import trained_brick, with_brick
from workbench.run.memories import SavedMemory
from workbench.steps import EditMethod, GrowMethod, MemoryMethod, MergeMethod, TrainMethod
from workbench.vocabulary.align import AlignedVocabulary
from workbench.weights.lowrank import LowRankSum

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Taught:
    """What an edit step has taught.

    Attributes:
        step: The step's id.
        number: Its place among the steps, counted from 0.
        model: Weights and configuration after it.
        facts: The facts.
        memory: Directory of the memory that holds them, where the step made one.
    """

    step: str
    number: int
    model: Model
    facts: Sequence[Fact]
    memory: Path | None = None


@dataclass(frozen=True)
class Composition:
    """A configuration as lazy weights, and what its steps recorded.

    Attributes:
        model: Weights and configuration after the last step.
        steps: One record a step.
        edits: Step id -> directory of the edit's adapter, in the cache.
        reports: Step id -> what a merge method has to say once its tensors have been computed.
        memory: What acts on the live model beside the weights.
        grown: What grow steps did.
        trained: Step id -> directory of the brick that it trained, in the cache.
        taught: What each edit step taught, in order.
    """

    model: Model
    steps: list[dict[str, Any]]
    edits: dict[str, Path] = field(default_factory=dict)
    reports: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    memory: MemoryAt | None = None
    grown: list[GrownStep] = field(default_factory=list)
    trained: dict[str, Path] = field(default_factory=dict)
    taught: list[Taught] = field(default_factory=list)

    def records(self) -> list[dict[str, Any]]:
        """The steps' records with the methods' reports: to be asked for when the weights are written."""
        return [{**s, **(self.reports[s["id"]]() if s["id"] in self.reports else {})} for s in self.steps]


def deltas(
    brick: Brick | Resolved,
    base: Model,
    device: torch.device,
    events: Events = no_events,
    vocabulary: AlignedVocabulary | None = None,
) -> Deltas:
    """A brick's deltas on a base, in the output's vocabulary. Errors: a recipe whose result no longer has the base's tensors."""
    if isinstance(brick, Resolved):
        composed = compose(brick, device, events).model
        inner = with_head_of(composed.weights, base.weights, composed.config)
        if vocabulary is not None and brick.vocabulary is None:
            inner = vocabulary.on_base(inner)
        other_tokens = brick.tokenizer_path != brick.tokenizer_at(0)
        if other_tokens or {n: s.shape for n, s in inner.specs.items()} != {n: s.shape for n, s in base.weights.specs.items()}:
            raise WorkbenchError(
                f"recipe {brick.recipe.name} grows the base: its tensors have no counterpart to take a delta from",
                "Put its grow step into this recipe instead.",
            )
        return WeightsDelta(inner, base.weights)
    if brick.kind == "adapter" and vocabulary is not None:
        bound = bind(brick.adapter, vocabulary.plain.specs, Model(vocabulary.plain, base.config))
        return AlignedDeltas(bound, vocabulary.base_rows, vocabulary.tensors)
    if brick.kind == "adapter":
        return bind(brick.adapter, base.weights.specs, base)
    return WeightsDelta(fitted(brick, base, vocabulary.view(brick.name) if vocabulary else None), base.weights)


def compose(resolved: Resolved, device: torch.device, events: Events = no_events) -> Composition:
    """Wrap the base in the recipe's steps. Edits are solved here, on a live model, unless the cache has them."""
    current = resolved.base
    records: list[dict[str, Any]] = []
    edits: dict[str, Path] = {}
    reports: dict[str, Callable[[], dict[str, Any]]] = {}
    grown: list[GrownStep] = []
    trained: dict[str, Path] = {}
    taught: list[Taught] = []
    recipe, memory = resolved.recipe, resolved.memory
    for i, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
        record: dict[str, Any] = {"id": step_id, step.verb: step.name}
        if isinstance(step, MergeMethod):
            bricks = {
                name: deltas(resolved.bricks[name], resolved.base, device, events, resolved.vocabulary)
                for name in recipe.used_bricks(step)
            }
            found = measure(resolved, step, step_id, bricks, device, events)
            merged = MergedWeights(
                current, resolved.base, step, bricks, resolved.fingerprints, recipe.fields.seed, found.value, resolved.memo,
                contents=lambda: resolved.digests,
            )  # fmt: skip
            check_reach(merged, bricks, resolved.base, recipe, i)
            if not merged.merged:
                raise recipe.error(
                    ("steps", len(records), "where"),
                    f"{step_id}: no tensor to merge",
                    "Its bricks and `where` have no tensor in common: see `workbench brick show`.",
                )
            record |= {"bricks": list(bricks), "tensors": len(merged.merged), **found.record}
            reports[step_id] = partial(step.report, merged.notes)
            if whole := merged.whole(device):
                record["merged_whole"] = whole
                events(
                    {
                        "stage": "merge",
                        "step": step_id,
                        "text": f"space: core: {len(whole)} tensors are merged whole: {', '.join(whole[:3])}",
                    }
                )
            current = Model(merged, current.config)
            for before in grown:
                before.changed(merged.merged)
        elif isinstance(step, EditMethod):
            place = solve_edit(resolved, step, i, current, device, events)
            edits[step_id] = place
            edit = bind(Adapter(place, f"edit '{step_id}'"), current.weights.specs, current)
            factors = {name: update for name in edit.places if (update := edit.factors(name, device)) is not None}
            assert len(factors) == len(edit.places), "an edit is a product of factors everywhere"
            record |= {"tensors": len(factors), **(read_json(place / "edit.json") or {})}
            current = Model(LowRankSum(current.weights, factors), current.config)
            taught.append(Taught(step_id, i, current, edit_facts(place)))
            for before in grown:
                before.changed(factors)
        elif isinstance(step, MemoryMethod):
            saved = SavedMemory(solve_memory(resolved, step, step_id, resolved.keys[i], current, device, events))
            memory = MemoryAt(saved.path, saved.log.version, saved.digest())
            taught.append(Taught(step_id, i, current, [r.fact for r in saved.kept().facts], saved.path))
            record |= {"solved_on": saved.record["solved_on"], **saved.record["record"]}
        elif isinstance(step, GrowMethod):
            current, made, found_out = grow(
                resolved, step, i, current, grow_deltas(resolved, step, device, events), device, events
            )
            for before in grown:
                before.renamed(made.weights.growth)
            grown.append(made)
            record |= found_out
        elif isinstance(step, TrainMethod):
            place = trained[step_id] = trained_brick(resolved, step, i, current, device, events)
            current, names, of_training = with_brick(current, place, step, device)
            record |= {"tensors": len(names), "training": of_training}
            for before in grown:
                before.changed(names)
        records.append(record)
    if changes_result(recipe.fields.output):
        current = Model(adapt(current, resolved.base, recipe.fields.output), current.config)
    return Composition(current, records, edits, reports, memory, grown, trained, taught)


def grow_deltas(resolved: Resolved, step: GrowMethod, device: torch.device, events: Events = no_events) -> dict[str, Deltas]:
    """The deltas of the bricks that a grow step names."""
    return {name: deltas(resolved.bricks[name], resolved.base, device, events, resolved.vocabulary) for name in step.names()}
