"""A recipe with every reference resolved: files, digests, and the keys that name what each step computes."""

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
from workbench.resolve.resolved import Resolved, told_apart
from workbench.steps import Step
from workbench.vocabulary.align import AlignedVocabulary, Member, align


def resolve(recipe: Recipe, hub: Hub = FETCH, _above: tuple[Path, ...] = ()) -> Resolved:
    """Find and check every input of a recipe, from headers. All problems are listed at once.

    Args:
        recipe: The recipe.
        hub: Whether to fetch what is not here from the hub, after all headers have been found to fit, or headers alone.

    Errors: missing or unfit inputs, a recipe that needs itself, a brick recipe on another base, no room for the downloads.
    """
    if not hub.headers_only and not _above:
        ahead = resolve(recipe, replace(hub, headers_only=True))
        if not (ahead.headers_only or ahead.deferred):
            return ahead
        hub.check_space(ahead.downloads)
    checkpoint, revision = resolve_base(recipe.fields.base, recipe.project, hub)
    found = Resolved(recipe, checkpoint, {}, revision)
    found.warnings.extend(buffers_left_out(checkpoint))
    problems: list[WorkbenchError] = []
    for name, ref in recipe.fields.bricks.items():
        try:
            if ref.kind == "recipe":
                found.bricks[name] = _inner(found, name, ref.target, hub, _above)
            else:
                found.bricks[name] = resolve_brick(name, ref, recipe.project, hub)
        except WorkbenchError as error:
            problems.append(error)
    reasons, unread = find_ties(found.bricks, checkpoint, found.deferred)
    problems += unread.values()
    found.unties.extend(reason for name, reason in reasons.items() if name in found.parents)
    found.warnings.extend(found.unties)
    if recipe.fields.tokenizer and not problems:
        found = replace(found, vocabulary=_aligned(found))
    for name, there in found.bricks.items():
        try:
            if name in unread:
                continue
            with or_at_run(found, f"brick '{name}': fits the base"):
                found.warnings.extend(
                    check_brick(there, found, hub) if isinstance(there, Brick) else check_recipe(name, there, found)
                )
        except WorkbenchError as error:
            problems.append(error)
    kinds = {name: there.kind if isinstance(there, Brick) else "recipe" for name, there in found.bricks.items()}
    problems += [*check_steps(recipe, found.base, found.bricks), *check_form(recipe, kinds)]
    if problems:
        raise _all(problems)
    found = _bound(found)
    found.warnings.extend(edit_warnings(found, hub))
    for there in found.bricks.values():
        if isinstance(there, Resolved):
            found.deferred.extend(there.deferred)
        elif there.kind == "checkpoint":
            found.deferred.extend(there.checkpoint.deferred)
    found.deferred[:0] = checkpoint.deferred
    return found


def _aligned(resolved: Resolved) -> AlignedVocabulary:
    """The output's vocabulary, as the recipe's `tokenizer` block says."""
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
    """Bind each step to the tokenizer in effect before it. Raises WorkbenchError if the tokenizer cannot do what the step asks."""
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
            f"brick '{name}': {target} needs itself: " + " -> ".join(p.name for p in (*chain, path)),
            "A recipe cannot be its own brick.",
            2,
        )
    inner = resolve(load_recipe(path), hub, chain)
    if memory := inner.recipe.memory:
        raise WorkbenchError(
            f"brick '{name}': {target} ends in `edit: {memory.name}`, whose memory is no delta of the base's weights",
            "Merge its other steps, and put the memory last in this recipe.",
            2,
        )
    with or_at_run(outer, f"brick '{name}': {inner.recipe.fields.base} and {recipe.fields.base} are one base"):
        if inner.base_path != outer.base_path and inner.base_digest != outer.base_digest:
            raise WorkbenchError(
                f"brick '{name}': {target} has the base {inner.recipe.fields.base}, this recipe {recipe.fields.base}",
                "A brick's delta refers to the recipe's base: use the same one.",
            )
    return inner
