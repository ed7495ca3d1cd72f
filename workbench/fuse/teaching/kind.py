"""Fuse steps: teachers read the texts, then the current model is trained on the texts and on their distributions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.fuse.teaching.lesson import Room, Teacher, lesson
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.models.architecture import max_positions, text_parts
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.skeleton import check_decoder
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, numel, seconds_of
from workbench.run.kind import StepContext, shapes_of_brick
from workbench.run.kinds.train import TrainKind
from workbench.steps import FuseMethod
from workbench.train.rows import CROSS_ENTROPY, Objective
from workbench.train.spec import TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NO_LIMIT = 2**31 - 1


class FuseKind(TrainKind[FuseMethod]):
    """Steps that train the current model on the distributions of teachers."""

    def objective(self, step: FuseMethod, context: StepContext, current: Model, settings: TrainSpec) -> Objective:
        """Return the fused loss; with weight 0, the cross-entropy with the texts alone, for which no teacher runs."""
        if step.weight == 0:
            return CROSS_ENTROPY
        resolved, source = context.resolved, context.resolved.tokenizer_at(context.number)
        teachers = [_teacher(name, context) for name in step.teachers]
        digest = resolved.keys[context.number - 1] if context.number else resolved.base_digest
        base = Teacher("base", source, digest, max_positions(current.config), partial(_live, current, source, context.device))
        stated = [part.get("vocab_size") for part in text_parts(current.config)]
        room = Room(
            resolved.recipe.project,
            resolved.cache,
            source,
            next((size for size in stated if isinstance(size, int)), _NO_LIMIT),
            context.device,
            partial(context.say, "fuse"),
            context.progress("fuse"),
        )
        return lesson(step, settings, teachers, base, room)

    def plan_row(
        self, step: FuseMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add the bytes and passes of the teachers to what the training needs."""
        row, after = super().plan_row(step, resolved, number, model, needs)
        settings = step.settings(0)
        if isinstance(settings.data, str):
            row["trains_on"] = settings.data
        row["bricks"] = {name: resolved.bricks[name].kind for name in step.teachers}
        if self.is_cached(resolved, number) or step.weight == 0:
            return row, after
        for name in step.teachers:
            size = numel(shapes_of_brick(resolved, name))
            needs.read += resolved.bricks[name].input_bytes
            needs.hold(8 * size)
            needs.seconds += seconds_of(step.cost(resolved.recipe.project), size, passes=1)
        return row, after


KIND = FuseKind()


def _teacher(name: str, context: StepContext) -> Teacher:
    """Return a brick as a teacher."""
    resolved, device = context.resolved, context.device
    path, config = resolved.tokenizer_of(name), shapes_of_brick(resolved, name).config
    try:
        check_decoder(config)
    except WorkbenchError as error:
        hint = "Teachers must be decoder-only language models."
        raise error.reworded(f"teacher '{name}': {error.message}", hint) from None
    # An adapter's digest does not say which base it is added to.
    digest = resolved.digests[name]
    if resolved.bricks[name].kind == "adapter":
        digest = json_digest([digest, resolved.base_digest])
    return Teacher(name, path, digest, max_positions(config), lambda: _live(context.whole_model(name), path, device))


def _live(model: Model, source: Path, device: torch.device) -> PreTrainedModel:
    """Return a live model in float32."""
    return live_model(model.config, compute(model, torch.float32, device), source, device)
