"""Merge steps in a run: their bricks' deltas, what the method measures, and what `plan` says of them."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from workbench.bricks.brick import Brick, vocabulary_digest
from workbench.files import json_digest
from workbench.merge.streaming.deltas import Deltas
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.skeleton import causal_skeleton
from workbench.recipe.methods import method
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, brick_bytes, kind_name, numel
from workbench.run.kind import Kind, StepContext, StepResult, kind_of
from workbench.run.peaks import Merged, largest, merge_bytes
from workbench.steps import Measured, MergeContext, MergeMethod
from workbench.weights.parallel import one_thread
from workbench.weights.specs import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Merge(Kind[MergeMethod]):
    """Steps that add bricks' deltas to the current weights."""

    def apply(self, step: MergeMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the merged weights. Raises WorkbenchError if the step reaches no tensor, or tensors that a growth has changed."""
        resolved, recipe = context.resolved, context.recipe
        bricks = {name: context.deltas(name) for name in recipe.used_bricks(step)}
        measured = _measured(context, step, bricks)
        merged = MergedWeights(
            current,
            resolved.base,
            step,
            bricks,
            resolved.fingerprints,
            context.seed,
            measured.value,
            resolved.memo,
            contents=lambda: resolved.digests,
        )
        _check_reach(context, step, merged, bricks, [result.id for result in earlier if result.grown])
        if not merged.merged:
            raise recipe.error(
                ("steps", context.number, "where"),
                f"{context.id}: no tensor to merge",
                "Its bricks and `where` have no tensor in common: see `workbench brick show`.",
            )
        record = {"bricks": list(bricks), "tensors": len(merged.merged), **measured.record}
        if whole := merged.whole(context.device):
            record["merged_whole"] = whole
            context.told("merge", f"space: core: {len(whole)} tensors are merged whole: {', '.join(whole[:3])}")
        report = partial(step.report, merged.notes)
        return StepResult(Model(merged, current.config), record, merged.merged, report=report)

    def plan_row(
        self, step: MergeMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, Any], Model]:
        """Add the bricks' bytes, the memory of the largest tensors, and edits of bricks that are not solved yet."""
        names = resolved.recipe.used_bricks(step)
        bricks = {name: resolved.bricks[name] for name in names}
        row: dict[str, Any] = {"bricks": {n: kind_name(b) for n, b in bricks.items()}, "passes": step.laws.passes}
        needs.read += sum(brick_bytes(b) * (1 if kind_name(b) == "adapter" else step.laws.passes) for b in bricks.values())
        needs.width = max(needs.width, len(names))
        merged = Merged.of(resolved, names)
        sizes = merge_bytes(step, resolved, names, merged)
        needs.whole = max(needs.whole, largest(sizes.values(), needs.threads))
        for name, held in sizes.items():
            needs.tensors[name] = max(held, needs.tensors.get(name, 0))
            rank = merged.ranks[name] if merged and step.keeps_rank() else None
            before = needs.ranks.get(name, 0)
            needs.ranks[name] = None if rank is None or before is None else before + rank
        if unsolved := [cost for name, brick in bricks.items() for cost in _unsolved(brick, name)]:
            row["edits"] = unsolved
            needs.seconds += sum(cost.get("seconds", 0) for cost in unsolved)
            needs.live = max(needs.live, 8 * numel(resolved.base))
        if step.laws.needs != "tensor":
            row |= {"needs": step.laws.needs, "inputs": step.inputs()}
            needs.live = max(needs.live, step.measure_bytes(resolved.base))
        return row, model


KIND = Merge()


def _unsolved(brick: Brick | Resolved, name: str) -> list[dict[str, Any]]:
    """Return the cost of each step that is not solved yet, in a recipe as a brick and in the recipes among its bricks."""
    if isinstance(brick, Brick):
        return []
    costs = [cost for inner_name, inner in brick.bricks.items() for cost in _unsolved(inner, f"{name}.{inner_name}")]
    for number, (step, step_id) in enumerate(zip(brick.recipe.steps, brick.recipe.step_ids, strict=True)):
        kind = kind_of(step)
        cost = None if kind.is_cached(brick, number) else kind.solving(step, brick, number, brick.base)
        if cost is not None:
            costs.append({"id": f"{name}.{step_id}", step.verb: step.name, **cost})
    return costs


def _check_reach(
    context: StepContext, step: MergeMethod, merged: MergedWeights, bricks: Mapping[str, Deltas], grown: Sequence[str]
) -> None:
    """Raise WorkbenchError if bricks change tensors that a growth before the step has left out or reshaped."""
    if not grown:
        return
    base, recipe = context.resolved.base, context.recipe
    left = {merged.origin(name) for name in merged.specs}
    lost = [n for n in base.weights.specs if n not in left and (step.where is None or step.where.matches(n, base))]
    for brick, delta in bricks.items():
        if gone := [n for n in lost if delta.touches(n)]:
            raise recipe.error(
                ("steps", context.number),
                f"{context.id}: brick '{brick}' changes {len(gone)} tensors that {grown[-1]} has left out ({gone[0]})",
                "Merge it before that step, or keep those layers out of this step with `where`.",
            )
    changed = [n for n in merged.merged if merged.specs[n].shape != base.weights.specs[merged.origin(n) or ""].shape]
    if changed:
        raise recipe.error(
            ("steps", context.number),
            f"{context.id}: {grown[-1]} has changed the shape of {len(changed)} tensors that bricks reach ({changed[0]})",
            "Merge before that step, or keep these tensors out of this step with `where`.",
        )


def _measured(context: StepContext, step: MergeMethod, bricks: Mapping[str, Deltas]) -> Measured:
    """Return what the method measures on texts or models before the first tensor; nothing where it needs only tensors."""
    if step.laws.needs == "tensor":
        return Measured(None)
    from transformers import AutoTokenizer

    resolved, device = context.resolved, context.device
    base, source = resolved.base, resolved.tokenizer_at(0)
    alone = method(MergeMethod, "average").model_validate({"merge": "average"})

    def weights(brick: str) -> Weights:
        return MergedWeights(base, base, alone, {brick: bricks[brick]}) if brick else base.weights

    def live(brick: str) -> PreTrainedModel:
        gc.collect()  # the model before hangs in reference cycles
        return live_model(base.config, compute(Model(weights(brick), base.config), torch.float32, device), source, device)

    digests = {name: resolved.digests[name] for name in bricks} | {"": ""}
    words = [vocabulary_digest(source), resolved.recipe.fields.model_dump(mode="json").get("tokenizer")]
    keys = {name: json_digest([resolved.base_digest, digest, words]) for name, digest in digests.items()}
    given = MergeContext(
        list(bricks),
        keys,
        base,
        weights,
        live,
        partial(causal_skeleton, base.config, device),
        AutoTokenizer.from_pretrained(source, trust_remote_code=False),
        device,
        resolved.recipe.project,
        resolved.cache,
        context.progress("measure"),
    )
    with one_thread():
        return step.measure(given)
