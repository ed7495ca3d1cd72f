"""Merge steps: plans, measurements, checks and lazy merged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.merge.streaming.deltas import Deltas, MaskedDeltas, StepBricks
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.identity import computed_on
from workbench.models.layout import Model
from workbench.models.skeleton import causal_skeleton
from workbench.recipe.methods import method
from workbench.resolve.keys import products
from workbench.resolve.resolved import Resolved
from workbench.run.compose import check_not_grown
from workbench.run.costs import Needs, UnsolvedStep, cost_row, largest, merge_bytes, merged_ranks, numel, seconds_of, set_row
from workbench.run.kind import Kind, StepContext, StepResult, kind_of
from workbench.steps import Measured, MergeContext, MergeMethod
from workbench.vocabulary.tokens import reading_bytes
from workbench.weights.device import free_models, one_thread
from workbench.weights.specs import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.activations.sets import NeuronSet
    from workbench.steps import EditMethod
    from workbench.weights.masks import TensorMask


class Merge(Kind[MergeMethod]):
    """Steps that add bricks' deltas to the current weights."""

    def apply(self, step: MergeMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the merged weights.

        Raises:
            WorkbenchError: If the step changes no tensor, or tensors that an earlier grow step has removed or reshaped.
        """
        resolved, recipe = context.resolved, context.recipe
        deltas = {name: context.deltas(name) for name in recipe.used_bricks(step)}
        chosen = _Neurons.of(step, resolved)
        bricks = (
            chosen.bricks(resolved, deltas) if chosen else StepBricks(deltas, resolved.fingerprints, lambda: resolved.digests)
        )
        measured = Measured(None)
        if step.laws.needs != "tensor":
            with one_thread():
                measured = step.measure(measuring_context(context, bricks))
            free_models(resolved.base.weights)  # the tensors are merged without them
        merged = MergedWeights(
            current, resolved.base, step, bricks, seed=context.seed, measured=measured.value, memo=resolved.memo
        )
        _check_reach(context, step, merged, bricks.deltas, [result.id for result in earlier if result.grown])
        if not merged.merged:
            raise recipe.error(
                ("steps", context.number, "where"),
                f"{context.id}: no tensor to merge: the bricks change no tensor that `where` selects",
                "`workbench brick show BRICK` lists the tensors that a brick changes.",
            )
        record = {"bricks": list(deltas), "tensors": len(merged.merged), **measured.record}
        record |= {"neurons": chosen.row()} if chosen else {}
        if (overlap := merged.overlap(context.device)) is not None:
            record["overlap"] = overlap.row()
        if whole := merged.whole(context.device):
            record["merged_whole"] = whole
            text = (
                f"space: core: {len(whole)} tensors without low-rank factors are merged as whole deltas: {', '.join(whole[:3])}"
            )
            context.say("merge", text)
        report = partial(step.report, merged.notes)
        weights: Weights = merged
        if step.along_arc and (vocabulary := resolved.vocabulary):
            from workbench.weights.row_alignment import KeptRows

            weights = KeptRows(merged, current.weights, vocabulary.equal_rows(list(deltas)), vocabulary.tensors)
        return StepResult(Model(weights, current.config), record, merged.merged, report=report)

    def plan_row(
        self, step: MergeMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add the bytes of the bricks, the memory for the largest tensors, and the cost of unsolved edits in brick recipes."""
        names = resolved.recipe.used_bricks(step)
        bricks = {name: resolved.bricks[name] for name in names}
        row: dict[str, object] = {"bricks": {n: b.kind for n, b in bricks.items()}, "passes": step.passes()}
        needs.read += sum(b.input_bytes * (1 if b.kind == "adapter" else step.passes()) for b in bricks.values())
        needs.width = max(needs.width, len(names))
        ranks = merged_ranks(resolved, names)
        sizes = merge_bytes(step, resolved, names, ranks)
        needs.whole = max(needs.whole, largest(sizes.values(), needs.threads))
        for name, held in sizes.items():
            needs.tensors[name] = max(held, needs.tensors.get(name, 0))
            rank = ranks[name] if ranks is not None and step.keeps_rank() else None
            before = needs.ranks.get(name, 0)
            needs.ranks[name] = None if rank is None or before is None else before + rank
        nested = [name for name in names if name in resolved.nested]
        for name in nested:
            check_not_grown(resolved.nested[name], resolved)
        if unsolved := [inner for name in nested for inner in _unsolved(resolved.nested[name], name)]:
            row["edits"] = unsolved
            needs.seconds += sum(step.seconds or 0 for step in unsolved)
            needs.hold(8 * numel(resolved.base))
        if chosen := _Neurons.of(step, resolved):
            row["neurons"] = chosen.row()
        if step.laws.needs != "tensor":
            row |= {"needs": step.laws.needs, "inputs": step.inputs()}
            if measured := step.measure_bytes(resolved.base):
                needs.hold(measured + reading_bytes(resolved.base_path))
        return row, model


KIND = Merge()


@dataclass(frozen=True)
class _Neurons:
    """The neurons that a merge step is limited to.

    Attributes:
        folder: Directory of the set, as in the recipe.
        neurons: The set.
        masks: Tensor of the base -> rows or columns of these neurons.
    """

    folder: str
    neurons: NeuronSet
    masks: Mapping[str, TensorMask]

    @classmethod
    def of(cls, step: MergeMethod, resolved: Resolved) -> _Neurons | None:
        """Return the neurons of a step, or None if it is not limited to a set."""
        if not (named := step.neuron_set()):
            return None
        from workbench.activations.sets import set_masks

        neurons = resolved.neurons(named[1])
        return cls(named[1], neurons, set_masks(neurons, resolved.base, named[1]))

    def bricks(self, resolved: Resolved, deltas: Mapping[str, Deltas]) -> StepBricks:
        """Return a step's bricks on these neurons alone."""
        masked = {name: MaskedDeltas(whole, self.masks) for name, whole in deltas.items()}
        return StepBricks(masked, resolved.fingerprints, lambda: self._digests(resolved), self.masks)

    def _digests(self, resolved: Resolved) -> dict[str, str]:
        """Return brick -> digest of its content on these neurons."""
        return {name: json_digest([digest, self.neurons.digest()]) for name, digest in resolved.digests.items()}

    def row(self) -> dict[str, object]:
        """Return the set as plain data, for the plan and the step's record."""
        return set_row(self.folder, self.neurons)


def _unsolved(resolved: Resolved, name: str) -> list[UnsolvedStep]:
    """Return the unsolved steps in a recipe used as a brick, including those of recipes that it uses as bricks."""
    steps = [step for inner_name, inner in resolved.nested.items() for step in _unsolved(inner, f"{name}.{inner_name}")]
    for number, (step, step_id) in enumerate(zip(resolved.recipe.steps, resolved.recipe.step_ids, strict=True)):
        if step.kind == "edit" and not kind_of(step).is_cached(resolved, number):
            cost = cast("EditMethod", step).cost(resolved.base, resolved.recipe.project, resolved.cache)
            work = cost_row(cost, seconds_of(cost, numel(resolved.base), passes=1))
            steps.append(UnsolvedStep.model_validate({"id": f"{name}.{step_id}", step.verb: step.name, **work}))
    return steps


def _check_reach(
    context: StepContext, step: MergeMethod, merged: MergedWeights, bricks: Mapping[str, Deltas], grown: Sequence[str]
) -> None:
    """Raise WorkbenchError if bricks change tensors that an earlier grow step has removed or reshaped."""
    if not grown:
        return
    base, recipe = context.resolved.base, context.recipe
    left = {merged.origin(name) for name in merged.specs}
    lost = [n for n in base.weights.specs if n not in left and (step.where is None or step.where.matches(n, base))]
    for brick, delta in bricks.items():
        if gone := [n for n in lost if delta.touches(n)]:
            raise recipe.error(
                ("steps", context.number),
                f"{context.id}: brick '{brick}' changes {_counted(gone)} that step {grown[-1]} has removed, such as {gone[0]}",
                "Merge the brick before that step, or exclude those layers with `where`.",
            )
    changed = [n for n in merged.merged if merged.specs[n].shape != base.weights.specs[merged.origin(n) or ""].shape]
    if changed:
        raise recipe.error(
            ("steps", context.number),
            f"{context.id}: bricks change {_counted(changed)} whose shape step {grown[-1]} has changed, such as {changed[0]}",
            "Merge the bricks before that step, or exclude these tensors with `where`.",
        )


def _counted(tensors: Sequence[str]) -> str:
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}"


def measuring_context(context: StepContext, bricks: StepBricks) -> MergeContext:
    """Return what a measurement on texts and models needs: the base and the bricks' models, on request."""
    from workbench.models.live import compute, live_model
    from workbench.models.prompts import load_tokenizer

    resolved, device = context.resolved, context.device
    base, source = resolved.base, resolved.tokenizer_at(0)
    alone = method(MergeMethod, "average").model_validate({"merge": "average"})

    def weights(brick: str) -> Weights:
        return MergedWeights(base, base, alone, StepBricks({brick: bricks.deltas[brick]})) if brick else base.weights

    def live(brick: str) -> PreTrainedModel:
        free_models(base.weights)
        return live_model(base.config, compute(Model(weights(brick), base.config), torch.float32, device), source, device)

    known = bricks.contents()
    digests = {name: known[name] for name in bricks.deltas} | {"": ""}
    around = [resolved.base_key, resolved.tokens_at(0), computed_on(device)]
    keys = {name: json_digest([*around, digest, *products(resolved, [name] if name else [])]) for name, digest in digests.items()}
    return MergeContext(
        list(bricks.deltas),
        keys,
        base,
        weights,
        live,
        partial(causal_skeleton, base.config, device),
        load_tokenizer(source),
        device,
        resolved.recipe.project,
        resolved.cache,
        context.progress("measure"),
    )
