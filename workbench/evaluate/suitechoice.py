"""Suites that recipes and commands ask for: names of suite files, inline tasks, and facts of edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import UsageError
from workbench.evaluate.facts import EDITS, PREFIX, Wanted, facts_of_edits, sequential, streams_of, wanted
from workbench.recipe.fields import FactsEval, InlineEval
from workbench.recipe.recipe import Recipe
from workbench.scores.suite import Suite, load_suite


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
