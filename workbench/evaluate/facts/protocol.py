"""Facts that are edited one after another: the checkpoints of an edit, and the facts that are scored there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.errors import InvalidRecipeError
from workbench.evaluate.facts.wanted import Wanted, ranked, read_step, streams_of, wanted
from workbench.facts import Fact
from workbench.recipe.fields import FactsEval, SequentialEval
from workbench.recipe.recipe import Recipe, dump_step
from workbench.steps import Step

FEWEST = 10  # smallest number of facts in a cohort if batches are smaller


def sequential(recipe: Recipe, options: FactsEval) -> Wanted:
    """Return the facts to score at an edit's checkpoints, with the cohorts of each checkpoint.

    Raises:
        WorkbenchError: If no edit step has these facts, or the step cannot use the first facts of a file.
    """
    facts = wanted(options, recipe.project, streams_of([recipe]))
    step, total = _step(recipe, facts)
    settings = options.sequential or SequentialEval()
    batch = getattr(getattr(getattr(step, "mode", None), "sequential", None), "batch", 1)
    size = settings.cohort or max(batch, FEWEST)
    states = {n: _lasting(facts, n) for n in _numbers(settings, facts, total)}
    return replace(facts, cohorts={n: _cohorts(state, size, settings.sample) for n, state in states.items()})


def checkpoints(recipe: Recipe, options: FactsEval) -> Iterator[tuple[int, Recipe]]:
    """Yield (n, the recipe with only the first n facts) for every checkpoint except the last, which is the recipe itself.

    Raises:
        WorkbenchError: If no edit step has these facts, or the step cannot use the first facts of a file.
    """
    facts = wanted(options, recipe.project, streams_of([recipe]))
    step, total = _step(recipe, facts)
    for n in _numbers(options.sequential or SequentialEval(), facts, total)[:-1]:
        steps: list[Mapping[str, Any]] = [{**dump_step(s), **({"first": n} if s is step else {})} for s in recipe.steps]
        yield n, recipe.derive(f"{recipe.stem}-first-{n}", steps, recipe.fields.bricks)


def _step(recipe: Recipe, facts: Wanted) -> tuple[Step, int]:
    """Return the edit step with these facts, and the number of its facts; of a stream, the number of its rows."""
    for step in recipe.steps:
        taught = read_step(step, recipe.project)
        if [fact.document() for fact in taught] != [
            fact.document() for fact in facts.everything
        ]:  # order matters, because cohorts follow it
            continue
        if "first" not in type(step).model_fields:
            raise InvalidRecipeError(
                f"recipe {recipe.name}: sequential: edit {step.name} has no field `first`",
                "Score it without `sequential`, or use a method that has the field `first`.",
            )
        return step, int(getattr(step, "first", None) or len(facts.stream.events if facts.stream else facts.everything))
    raise InvalidRecipeError(
        f"recipe {recipe.name}: sequential: no edit step uses the facts of {facts.source}",
        "Give the facts file of an edit step.",
    )


def _numbers(settings: SequentialEval, facts: Wanted, total: int) -> list[int]:
    """Return the checkpoints that have facts to score; the last one is the complete edit."""
    return [*sorted({n for n in settings.checkpoints if n < total and _lasting(facts, n)}), total]


def _lasting(facts: Wanted, n: int) -> Sequence[Fact]:
    """Return the facts of the first n rows, without those that later rows update or remove: they have another target there."""
    if facts.stream is None:
        return facts.everything[:n]
    final = {fact.text: fact.target for fact in facts.everything}
    return [fact for fact in facts.stream.first(n).current if final.get(fact.text) == fact.target]


def _cohorts(facts: Sequence[Fact], size: int, sample: int) -> dict[str, tuple[str, ...]]:
    """Return IDs of the first facts, the last ones, and a sample of all: those with the smallest hash of their ID."""
    chosen = ranked(facts, sample)
    return {"first": _ids(facts[:size]), "last": _ids(facts[-size:]), "sample": _ids([f for f in facts if f.id in chosen])}


def _ids(facts: Sequence[Fact]) -> tuple[str, ...]:
    return tuple(fact.id for fact in facts)
