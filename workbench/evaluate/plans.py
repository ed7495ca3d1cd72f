"""Suites that recipes are scored on, and their plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.evaluate import build_plan
from workbench.evaluate.facts.suite import build
from workbench.evaluate.facts.wanted import EDITS, PREFIX, Wanted, facts_of_edits, sequential, streams_of, wanted
from workbench.evaluate.lineup import LineupEntry
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.models.identity import tokenizer_difference
from workbench.recipe.fields import FactsEval, InlineEval
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.scores.plan import Item, PlanRecord, ScorePlan
from workbench.scores.store import ScoreStore, plan_record, stored_plans
from workbench.scores.suite import Suite, load_suite


def plans(
    entries: Sequence[LineupEntry],
    suites: Iterable[Suite | Wanted],
    *,
    batch_size: int,
    limit: int | None,
    device: Any = None,
    events: Events = no_events,
    lenient: bool = False,
) -> list[ScorePlan]:
    """Return one plan per suite, in the output's dtype; `LineupEntry.plan` reads its texts with a configuration's own tokenizer.

    Args:
        entries: Configurations to score.
        suites: Suites, and facts to build suites from.
        batch_size: Requests per forward pass.
        limit: Largest number of items per task.
        device: Device on which the base answers the prompts that edits must not change; None: use stored answers.
        events: Receives progress.
        lenient: Skip facts whose tasks have not been built yet, instead of raising an error.

    Raises:
        WorkbenchError: If output dtypes or chat templates differ, or a plan cannot be made.
    """
    resolved = entries[0].resolved
    dtypes: dict[str, list[str]] = {}
    for entry in entries:
        dtypes.setdefault(scored_dtype(entry.resolved), []).append(entry.name)
    if len(dtypes) > 1:
        listed = ", ".join(f"{dtype}: {names[0]}" for dtype, names in sorted(dtypes.items()))
        raise WorkbenchError(
            f"the configurations have different output dtypes ({listed})",
            "Give all recipes the same `output: {dtype:}`; for a model, write a recipe with the model as base.",
        )
    suites_with_tasks: list[tuple[Suite, Path]] = []
    for suite in suites:
        if not isinstance(suite, Wanted):
            suites_with_tasks.append((suite, resolved.recipe.project / "evals" / "tasks"))
            continue
        try:
            suites_with_tasks.append(build(suite, _base(entries), device, events))
        except WorkbenchError:
            if not lenient:
                raise
    _check_templates(entries, [suite for suite, _ in suites_with_tasks])
    return [
        build_plan(
            suite,
            resolved.tokenizer_path,
            tasks_dir=tasks,
            dtype=next(iter(dtypes)),
            batch_size=batch_size,
            limit=limit,
            memo=resolved.cache / "tasks",
        )
        for suite, tasks in suites_with_tasks
    ]


@dataclass(frozen=True)
class RecordedPlan(ScorePlan):
    """A plan of the store; its items have no ids. Nothing shows that the suite's tasks and data are still the same."""

    recorded: str = ""

    @property
    def digest(self) -> str:
        """Digest of the plan when it was scored."""
        return self.recorded


def recorded_plans(
    entries: Sequence[LineupEntry], suites: Iterable[Suite | Wanted], limit: int | None, store: ScoreStore
) -> list[ScorePlan]:
    """Return the newest plan of each suite in a store, for an installation without lm-eval, which cannot read the suites' tasks.

    Raises:
        WorkbenchError: If the store has no plan of a suite, with at most `limit` items per task.
    """
    first, rows = entries[0].resolved, stored_plans(store)
    dtype, found = scored_dtype(first), []
    for suite in suites:
        for row in rows:
            fits = max(row.tasks.values(), default=0) <= limit if limit else not row.partial
            if (
                (row.suite, row.dtype) == (suite.suite, dtype)
                and fits
                and row.configurations
                and not row.outdated
                and not row.imported
            ):
                found.append(_recorded(plan_record(store.root / row.folder), first.tokenizer_path))
                break
        else:
            raise WorkbenchError(
                f"suite '{suite.suite}' has no scores of {dtype} models in {store.root}, and lm-eval, which scores, is not installed",
                "pip install 'brick-workbench[eval]', or copy the scores of another machine to that folder.",
            )
    return found


def _recorded(record: PlanRecord, tokenizer: Path) -> ScorePlan:
    tasks = record.tasks.items()
    return RecordedPlan(
        suite=Suite.model_validate(record.suite),
        items={name: (Item("", ""),) * task.n for name, task in tasks},
        kinds={name: task.kind for name, task in tasks},
        metrics={name: tuple(task.metrics) for name, task in tasks},
        tokenizer=tokenizer,
        tokenizer_digest=record.tokenizer or "",
        tasks_dir=Path(),
        dtype=record.dtype or "",
        batch_size=record.batch_size or 0,
        partial=record.partial,
        scorer=record.scorer,
        recorded=record.plan,
    )


def _base(entries: Sequence[LineupEntry]) -> Resolved:
    """Return the base that edits are compared with: the one that is scored, else that of the first configuration."""
    first = next((entry for entry in entries if entry.role == "base"), entries[0]).resolved
    return resolve(first.recipe.derive("base", [])) if first.recipe.steps else first


def _check_templates(entries: Sequence[LineupEntry], suites: Sequence[Suite]) -> None:
    """Check that all tokenizers and their chat templates are equal if a suite uses the template."""
    wrapped = next((suite.suite for suite in suites if suite.chat_template), None)
    # Read for every suite, so that a directory without a tokenizer is found before anything is scored.
    other = next((entry for entry in entries if entry.tokenizer != entries[0].tokenizer and wrapped), None)
    if other is not None:
        raise WorkbenchError(
            f"suite '{wrapped}' uses the chat template, but the tokenizers of {entries[0].name} and {other.name} differ in "
            + tokenizer_difference(entries[0].resolved.tokenizer_path, other.resolved.tokenizer_path),
            "Score them in two calls, or on a suite without `chat_template: true`.",
        )


def scored_dtype(resolved: Resolved) -> str:
    """Return the dtype that a configuration is scored in, such as "bfloat16": its output's, else its base's."""
    return resolved.dtype_name or next(spec.dtype_name for spec in resolved.base.weights.specs.values() if spec.is_float)


def suites_of(recipes: Sequence[Recipe], names: Sequence[str], project: Path) -> list[Suite | Wanted]:
    """Return the suites to score, in order; facts are returned as `Wanted`.

    Args:
        recipes: Recipes whose `eval` lists suites; used if `names` is empty.
        names: Names of suites, `facts:FILE`, or `edits` for the facts of all edits that the recipes use.
        project: Project folder.

    Raises:
        WorkbenchError: If there is nothing to score, `edits` is named without edits, two fact suites have the same name, or one
            file is listed with different options.
    """
    suites: dict[str, Suite | Wanted] = {}
    for suite in _requested(recipes, names, project):
        if not isinstance(suite, Wanted):
            suites.setdefault(suite.suite, suite)
            continue
        same_facts = (n for n, other in suites.items() if isinstance(other, Wanted) and _identity(other) == _identity(suite))
        key = next(same_facts, suite.suite)
        other = suites.setdefault(key, suite)
        if not isinstance(other, Wanted) or (_identity(other), _options(other)) != (_identity(suite), _options(suite)):
            same = isinstance(other, Wanted) and _identity(other) == _identity(suite)
            raise UsageError(
                f"facts: {suite.source} is listed with different options"
                if same
                else f"facts: two suites have the name '{suite.suite}'",
                "Use the same options for a file everywhere."
                if same
                else f"Rename {suite.source}, or score the two in two calls.",
            )
    if not suites:
        known = sorted(p.stem for p in (project / "evals" / "suites").glob("*.yaml"))
        listed = f" Suites here: {', '.join(known)}." if known else ""
        text = "the recipe has no suite to score" if recipes else "no suite to score"
        hint = "Give --suite NAME" + (", or add `eval: [NAME]` to the recipe." if recipes else ".")
        raise UsageError(text, hint + listed)
    return list(suites.values())


def _requested(recipes: Sequence[Recipe], names: Sequence[str], project: Path) -> Iterator[Suite | Wanted]:
    """Yield the suites that the names, or else the recipes, ask for."""
    streams = streams_of(recipes)
    for name in names:
        if name == EDITS:
            yield from _edits(recipes)
        else:
            yield (
                wanted(FactsEval(facts=name.removeprefix(PREFIX)), project, streams)
                if name.startswith(PREFIX)
                else load_suite(name, project)
            )
    for recipe in () if names else recipes:
        for i, item in enumerate(recipe.fields.eval):
            if isinstance(item, FactsEval):
                yield wanted(item, project, streams) if item.sequential is None else sequential(recipe, item)
            elif isinstance(item, InlineEval):
                yield inline_suite(recipe.stem, i, item)
            elif item == EDITS:
                yield from _edits([recipe])
            else:
                yield load_suite(item, project)


def _edits(recipes: Sequence[Recipe]) -> Iterator[Wanted]:
    selections = [facts for recipe in recipes for facts in facts_of_edits(recipe)]
    if not selections:
        recipe_names = ", ".join(recipe.name for recipe in recipes) or "models"
        raise UsageError(
            f"{EDITS}: no edit with facts in {recipe_names}", "Give the facts file itself: facts:recipes/facts/FILE."
        )
    yield from selections


def _identity(facts: Wanted) -> tuple[str, bool]:
    """Return the facts' digest, and whether they are scored one after another, which is a suite of its own."""
    return facts.digest, bool(facts.cohorts)


def _options(facts: Wanted) -> tuple[Any, ...]:
    return facts.options.model_dump(exclude={"facts"}), facts.cohorts


def inline_suite(name: str, index: int, item: InlineEval) -> Suite:
    """Return the tasks that a recipe lists itself as a suite; each document is its own cluster."""
    return Suite(
        suite=f"{name}-eval{index}",
        tasks=item.tasks,
        num_fewshot=item.num_fewshot,
        limit=item.limit,
        chat_template=item.chat_template,
        backend=item.backend,
        cluster="id",
    )
