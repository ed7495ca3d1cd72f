"""Resolving of a recipe: locate every input, check it, and download what is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workbench.bricks.brick import Brick
from workbench.bricks.hub import FETCH, Hub
from workbench.bricks.locate import resolve_base, resolve_brick
from workbench.bricks.tied import find_ties, rows_of
from workbench.errors import WorkbenchError
from workbench.recipe.recipe import Recipe, load_recipe
from workbench.resolve.adapter_form import check_form
from workbench.resolve.checks import buffers_left_out, check_brick, check_recipe, check_steps, edit_warnings, or_at_run
from workbench.resolve.neurons import check_neurons
from workbench.resolve.resolved import Resolved, told_apart
from workbench.steps import Step
from workbench.vocabulary.align import AlignedVocabulary, Member, align


def resolve(recipe: Recipe, hub: Hub = FETCH, _above: tuple[Path, ...] = ()) -> Resolved:
    """Locate and check every input of a recipe from file headers.

    Args:
        recipe: The recipe.
        hub: Access to the hub. By default, missing files are downloaded once all headers have passed the checks.
        _above: Files of the recipes that use this recipe as a brick.

    Raises:
        WorkbenchError: If inputs are missing or do not fit, a recipe uses itself, a recipe used as a brick has another base, or
            the disk is too full for the downloads. The message lists all problems.
    """
    if not hub.headers_only and not _above:
        ahead = resolve(recipe, replace(hub, headers_only=True))
        if not (ahead.headers_only or ahead.deferred):
            return ahead
        hub.check_space(ahead.downloads)
    checkpoint, revision = resolve_base(recipe.fields.base, recipe.project, hub)
    resolved = Resolved(recipe, checkpoint, {}, revision)
    resolved.warnings.extend(buffers_left_out(checkpoint))
    problems: list[WorkbenchError] = []
    for name, ref in recipe.fields.bricks.items():
        try:
            if ref.kind == "recipe":
                resolved.bricks[name] = _inner(resolved, name, ref.target, hub, _above)
            else:
                resolved.bricks[name] = resolve_brick(name, ref, recipe.project, hub)
        except WorkbenchError as error:
            problems.append(error)
    reasons, unread = find_ties(resolved.bricks, checkpoint, resolved.deferred)
    problems += unread.values()
    resolved.unties.extend(reason for name, reason in reasons.items() if name in resolved.parents)
    resolved.warnings.extend(resolved.unties)
    if recipe.fields.tokenizer and not problems:
        resolved = replace(resolved, vocabulary=_aligned(resolved))
    for name, brick in resolved.bricks.items():
        try:
            if name in unread:
                continue
            with or_at_run(resolved, f"brick '{name}': fits the base"):
                resolved.warnings.extend(
                    check_brick(brick, resolved, hub) if isinstance(brick, Brick) else check_recipe(name, brick, resolved)
                )
        except WorkbenchError as error:
            problems.append(error)
    kinds = {name: brick.kind if isinstance(brick, Brick) else "recipe" for name, brick in resolved.bricks.items()}
    problems += [*check_steps(recipe, resolved.base, resolved.bricks), *check_form(recipe, kinds), *check_neurons(resolved, hub)]
    if problems:
        raise _all(problems)
    resolved = _bound(resolved)
    resolved.warnings.extend(edit_warnings(resolved, hub))
    for brick in resolved.bricks.values():
        if isinstance(brick, Resolved):
            resolved.deferred.extend(brick.deferred)
        elif brick.kind == "checkpoint":
            resolved.deferred.extend(brick.checkpoint.deferred)
    resolved.deferred[:0] = checkpoint.deferred
    return resolved


def _aligned(resolved: Resolved) -> AlignedVocabulary:
    """Return the vocabulary that the recipe's `tokenizer` block describes."""
    block, cache, base = resolved.recipe.fields.tokenizer, resolved.cache, resolved.plain
    assert block is not None
    bricks = {n: b for n, b in resolved.bricks.items() if isinstance(b, Brick)}
    sampled = {n: b.stamp(cache) if b.headers_only else b.fingerprint(cache) for n, b in bricks.items()}
    keys = told_apart(
        sampled, lambda name: bricks[name].stamp(cache) if bricks[name].headers_only else bricks[name].digest(cache)
    )
    members = [Member(n, b.path, keys[n], *rows_of(b, base)) for n, b in bricks.items()]
    found = align(
        block, Member("base", resolved.base_path, "", base.weights, base.config), members, resolved.recipe.project, cache
    )
    resolved.warnings.extend([*found.warnings, *filter(None, [found.note()])])
    return found


def _bound(resolved: Resolved) -> Resolved:
    """Bind each step to the tokenizer in effect before it.

    Raises:
        WorkbenchError: If the tokenizer cannot do what the step asks.
    """
    steps: list[Step] = []
    tokenizers: list[Path] = []
    for step in resolved.recipe.steps:
        before = tokenizers[-1] if tokenizers else resolved.tokenizer_at(0)
        bound, after = step.bind(resolved.base, before, resolved.recipe.project, resolved.cache)
        steps.append(bound)
        tokenizers.append(after)
    if steps == list(resolved.recipe.steps) and set(tokenizers) <= {resolved.tokenizer_at(0)}:
        return resolved
    return replace(resolved, recipe=replace(resolved.recipe, steps=tuple(steps)), tokenizers=tuple(tokenizers))


def _all(problems: list[WorkbenchError]) -> WorkbenchError:
    hints = list(dict.fromkeys(p.hint for p in problems if p.hint))
    return WorkbenchError("\n".join(p.message for p in problems), "\n".join(hints) or None, max(p.exit_code for p in problems))


def _inner(outer: Resolved, name: str, target: str, hub: Hub, above: tuple[Path, ...]) -> Resolved:
    recipe = outer.recipe
    path = (recipe.project / target).resolve()
    chain = (*above, *([recipe.path.resolve()] if recipe.path else []))
    if path in chain:
        raise WorkbenchError(
            f"brick '{name}': recipe {target} uses itself: " + " -> ".join(p.name for p in (*chain, path)),
            "Remove this brick from one of these recipes.",
            2,
        )
    inner = resolve(load_recipe(path), hub, chain)
    if memory := inner.recipe.memory:
        raise WorkbenchError(
            f"brick '{name}': {target} ends in `edit: {memory.name}`, but a memory does not change weights and cannot be merged",
            "Remove the memory step from that recipe, and add it as the last step of this recipe.",
            2,
        )
    with or_at_run(outer, f"brick '{name}': {inner.recipe.fields.base} and {recipe.fields.base} are the same base"):
        if inner.base_path != outer.base_path and inner.base_digest != outer.base_digest:
            raise WorkbenchError(
                f"brick '{name}': {target} has the base {inner.recipe.fields.base}, but this recipe has {recipe.fields.base}",
                "Use the same base in both recipes: a brick's delta is taken against the recipe's base.",
            )
    return inner
