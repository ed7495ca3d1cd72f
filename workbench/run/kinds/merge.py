"""A merge step at composition: whether bricks reach any tensor, and what its method measures."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from workbench.bricks.brick import vocabulary_digest
from workbench.events import Events
from workbench.files import json_digest
from workbench.merge.streaming.deltas import Deltas
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.skeleton import causal_skeleton
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.methods import methods
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolved import Resolved
from workbench.steps import GrowMethod, Measured, MergeContext, MergeMethod
from workbench.weights.parallel import one_thread
from workbench.weights.specs import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_reach(merged: MergedWeights, bricks: Mapping[str, Deltas], base: Model, recipe: Recipe, at: int) -> None:
    """Errors: bricks of a merge step whose tensors a growth before has left out or changed in shape."""
    step, names = recipe.steps[at], recipe.step_ids
    grown = [name for s, name in zip(recipe.steps[:at], names, strict=False) if isinstance(s, GrowMethod)]
    if not grown or not isinstance(step, MergeMethod):
        return
    left = {merged.origin(name) for name in merged.specs}
    lost = [n for n in base.weights.specs if n not in left and (step.where is None or step.where.matches(n, base))]
    for brick, delta in bricks.items():
        if gone := [n for n in lost if delta.touches(n)]:
            raise recipe.error(
                ("steps", at), f"{names[at]}: brick '{brick}' changes {len(gone)} tensors that {grown[-1]} has left out ({gone[0]})",
                "Merge it before that step, or keep those layers out of this step with `where`.",
            )  # fmt: skip
    changed = [n for n in merged.merged if merged.specs[n].shape != base.weights.specs[merged.origin(n) or ""].shape]
    if changed:
        raise recipe.error(
            ("steps", at), f"{names[at]}: {grown[-1]} has changed the shape of {len(changed)} tensors that bricks reach ({changed[0]})",
            "Merge before that step, or keep these tensors out of this step with `where`.",
        )  # fmt: skip


def measure(
    resolved: Resolved, step: MergeMethod, step_id: str, bricks: Mapping[str, Deltas], device: torch.device, events: Events
) -> Measured:
    """What a merge method measures on texts or models before the first tensor; None where it needs only tensors."""
    if step.laws.needs == "tensor":
        return Measured(None)
    base, source = resolved.base, resolved.tokenizer_at(0)
    alone = methods()["merge:average"].model_validate({"merge": "average"})
    assert isinstance(alone, MergeMethod)

    def weights(brick: str) -> Weights:
        return MergedWeights(base, base, alone, {brick: bricks[brick]}) if brick else base.weights

    def live(brick: str) -> PreTrainedModel:
        gc.collect()  # the model before hangs in reference cycles
        return live_model(base.config, compute(Model(weights(brick), base.config), torch.float32, device), source, device)

    def progress(done: int, total: int, text: str) -> None:
        events({"stage": "measure", "step": step_id, "done": done, "total": total, "text": text})

    digests = {name: resolved.digests[name] for name in bricks} | {"": ""}
    words = [vocabulary_digest(source), resolved.recipe.fields.model_dump(mode="json").get("tokenizer")]
    keys = {name: json_digest([resolved.base_digest, digest, words]) for name, digest in digests.items()}
    tokenizer = load_tokenizer(source)
    context = MergeContext(
        list(bricks), keys, base, weights, live, partial(causal_skeleton, base.config, device), tokenizer, device,
        resolved.recipe.project, resolved.cache, progress)  # fmt: skip
    with one_thread():
        return step.measure(context)
