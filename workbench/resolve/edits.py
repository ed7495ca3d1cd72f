"""Checks of edits: bricks that were solved on other weights, and steps that continue the stream of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from workbench.bricks.brick import Brick
from workbench.bricks.card import read_card
from workbench.bricks.hub import Hub
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, shell
from workbench.ground.files import read_json
from workbench.ground.foreign_names import CARD
from workbench.models.identity import tokens_digest, vocabulary_digest
from workbench.resolve.findings import Findings, read_digest, read_state
from workbench.resolve.resolved import Resolved

if TYPE_CHECKING:
    from workbench.edit.closed_form.continuing import Earlier


def check_streams(resolved: Resolved, hub: Hub, findings: Findings) -> None:
    """Check that each stream that is continued was solved on the weights that its step meets.

    Raises:
        InvalidRecipeError: If a stream was solved on another base, with another tokenizer, or after other steps.
    """
    recipe = resolved.recipe
    if not any(step.kind == "edit" for step in recipe.steps):
        return  # before the editors are imported, which takes longer than most plans
    from workbench.edit.closed_form.preset import Preset

    for number, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
        if not isinstance(step, Preset):
            continue
        if step.preserve_steps and not any(before.kind == "edit" for before in recipe.steps[:number]):
            raise recipe.error(
                ("steps", number, "preserve_steps"),
                "no edit step comes before this one, whose facts it could preserve",
                "Remove `preserve_steps`, or put the step after another edit step. `continues` is for facts of an earlier run.",
            )
        if not step.in_order:
            continue
        earlier = step.earlier(recipe.project)
        if earlier is None:
            findings.warnings += [f"{step_id}: {text}" for text in _starts_anew(resolved)]
            continue
        with findings.or_at_run(f"step '{step_id}': {earlier.name} was solved on the same weights"):
            _check_weights(earlier, resolved, number, hub)


def _check_weights(earlier: Earlier, resolved: Resolved, number: int, hub: Hub) -> None:
    """Raise InvalidRecipeError if the weights, or the tokenizer, before a step are not those that a stream was solved on."""
    recipe, record = resolved.recipe, earlier.record
    step_id, name = recipe.step_ids[number], recipe.fields.base_name
    run = earlier.path.resolve().parent.parent
    if record.get("base") != read_digest(resolved, hub):
        card = read_card(earlier.path) if (earlier.path / CARD).is_file() else None
        base = card.base.id if card and card.base else "BASE"
        held = resolved.base_path.is_relative_to(run)
        problem = (
            "is the result of that run, whose facts are written again" if held else "has other weights or another config.json"
        )
        raise InvalidRecipeError(
            f"step '{step_id}': {earlier.name} was solved on the base {base} (digest {str(record.get('base'))[:10]}), but this recipe's "
            f"base {name} (digest {resolved.base_digest[:10]}) {problem}",
            f"Write `base: {base}`: the result has the facts of the run and those of this step."
            if held
            else f"Write `base: {base}`, or remove `continues` to start a stream on {name}.",
        )
    # Records of 0.2 have the digest of the vocabulary alone.
    known, digest = ("tokenizer", tokens_digest) if "tokenizer" in record else ("vocabulary", vocabulary_digest)
    if record.get(known) != digest(resolved.tokenizer_at(number)):
        raise InvalidRecipeError(
            f"step '{step_id}': {earlier.name} was solved with another tokenizer than that of {name}",
            "Use the tokenizer of the run, or remove `continues`.",
        )
    if record.get("solved_after") != read_state(resolved, number, hub):
        raise InvalidRecipeError(
            f"step '{step_id}': {earlier.name} was not solved on the weights that this step meets, because other steps came before it",
            f"Put the same steps before it as in {run / 'recipe.yaml'}, or remove `continues`.",
        )


def _starts_anew(resolved: Resolved) -> Iterator[str]:
    """Yield a sentence for a stream that starts on the result of a run with edits."""
    from workbench.edit.closed_form.continuing import RECORD, edits_of, without_history

    run = resolved.base_path.parent
    for place in edits_of(run) if (run / "run.json").is_file() else ():
        record = read_json(place / RECORD) or {}
        reason = without_history(record)
        text = f"starts without the history of {run.name}/edits/{place.name}, because "
        yield text + (
            reason or f"the step does not name it; to continue it, write `continues: runs/{run.name}` and the base of that run"
        )


def edit_record(brick: Brick) -> dict[str, object] | None:
    """Return the record of an edit brick, with the weights that it was solved on; None for other bricks."""
    record = read_json(brick.path / "edit.json")
    return record if isinstance(record, dict) and "solved_on" in record else None


def check_edit(brick: Brick, resolved: Resolved, hub: Hub) -> None:
    """Raise WorkbenchError if an edit was solved on another base."""
    record = edit_record(brick)
    if record is not None and record.get("base") != read_digest(resolved, hub):
        raise WorkbenchError(
            f"{brick.label}: this edit was solved on another base (digest {str(record.get('base'))[:10]}, "
            f"this base has {resolved.base_digest[:10]})",
            f"Solve it on this base: `{_rebase(brick, resolved, resolved.recipe.fields.base_name)}`.",
        )


def edit_warnings(resolved: Resolved, hub: Hub, findings: Findings) -> list[str]:
    """Return a warning for each edit brick that a step changes, or adds to weights other than those that it was solved on."""
    warnings: list[str] = []
    recipe = resolved.recipe
    for name, brick in resolved.on_disk.items():
        record = edit_record(brick)
        if record is None:
            continue
        for i, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
            if not step.merges or name not in recipe.used_bricks(step):
                continue
            with findings.or_at_run(f"{brick.label}: the edit was solved on the weights that step '{step_id}' adds it to"):
                reason = step.alters(name, recipe.used_bricks(step), step_id)
                if not reason and read_state(resolved, i, hub) != record.get("solved_after"):
                    reason = f"which was not solved on the weights that step '{step_id}' adds it to"
                if reason:
                    warnings.append(f"{brick.label}: an edit, {reason}. {_survival(brick, resolved)}")
                    break
    return warnings


def _survival(brick: Brick, resolved: Resolved) -> str:
    """Return advice on measuring how many facts survive, and on solving the edit again."""
    recipe, target = str(resolved.recipe.path or "RECIPE"), resolved.recipe.fields.bricks[brick.name].target
    text = "The result may lose facts"
    if (brick.path / "facts.jsonl").is_file():
        text += f": `{shell('workbench', 'eval', recipe, '--suite', f'facts:{target}/facts.jsonl')}` measures how many survive"
    return f"{text}. To keep them, solve the edit again on the result and add it in a last step: `{_rebase(brick, resolved, recipe)}`"


def _rebase(brick: Brick, resolved: Resolved, onto: str) -> str:
    target = resolved.recipe.fields.bricks[brick.name].target
    return shell("workbench", "edit", "rebase", target, "--onto", onto, "-o", f"bricks/{brick.name}-rebased")
