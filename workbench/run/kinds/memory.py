"""Memory steps: facts are learned on the live model and stored beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workbench.facts.facts import FACTS, write_facts
from workbench.facts.log import ADD, RECIPE, Credibility, append, lines_of
from workbench.ground.files import write_json
from workbench.ground.manifest import reusable
from workbench.models.layout import Model
from workbench.recipe.recipe import dump_step
from workbench.resolve.output import MemoryAt
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, numel
from workbench.run.kind import Kind, StepContext, StepResult, Taught
from workbench.run.memories import RECORD, MemoryRecord, SavedMemory, save_tensors_of
from workbench.run.teaching import is_counted, live_session
from workbench.steps import MemoryMethod, Remembered


class MemoryKind(Kind[MemoryMethod]):
    """Steps that store facts in a memory, which acts on the live model."""

    cached_in, record, rounded = "memories", RECORD, True

    def apply(self, step: MemoryMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the unchanged weights and the memory. It is learned now, unless the cache has it."""
        saved = SavedMemory(_learned(step, context, current))
        taught = Taught(context.id, context.number, current, [r.fact for r in saved.kept().facts], saved.path)
        record = {"solved_on": saved.record.solved_on, **saved.record.record}
        memory = MemoryAt(saved.path, saved.log.version, saved.digest())
        return StepResult(current, record, taught=taught, memory=memory)

    def plan_row(
        self, step: MemoryMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add the memory of a live float32 model, which learning and counting facts need."""
        cached = self.is_cached(resolved, number)
        if cached:
            needs.cached.append(resolved.recipe.step_ids[number])
        if not cached or not is_counted(resolved, number):  # counting its facts needs a live model
            needs.hold(8 * numel(model))
        return {"inputs": step.inputs()}, model


KIND = MemoryKind()


def _learned(step: MemoryMethod, context: StepContext, current: Model) -> Path:
    """Return the directory of a memory in the cache; learn it on the live current model if it is not there."""
    resolved, place = context.resolved, context.place("memories", rounded=True)
    if reusable(place, RECORD, digests=True):
        return place
    context.say("edit", f"{step.name} on {context.device}")
    # Learn on the weights in the output dtype, because the memory will act on those.
    steps, progress = len(resolved.recipe.steps), context.progress("edit")
    session = live_session(resolved, steps, current, context.device, progress, rounded_to=resolved.dtype)
    memory = step.solve(session.context)
    fresh = Credibility(1, 1, True, (), step.alpha, step.decay, step.floor)
    step.check_together([Remembered(fact, memory.tensors[fact.id], fresh) for fact in memory.facts])
    with context.made(place) as partial:
        partial.mkdir()
        append(partial, 1, lines_of(ADD, memory.facts, RECIPE, None))
        write_facts(partial / FACTS, sorted(memory.facts, key=lambda fact: fact.id))
        save_tensors_of(memory, partial, 1)
        record = MemoryRecord(
            method=step.name,
            method_version=step.version,
            step=dump_step(step),
            settings=dict(memory.settings),
            seed=context.seed,
            base=resolved.base_digest,
            solved_on=session.solved_on,
            record=dict(memory.record),
        )
        write_json(partial / RECORD, record.to_dict(), indent=2)
    return place
