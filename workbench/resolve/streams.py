"""Checks of edit steps that continue the stream of an earlier run, or that start from its result without the stream."""

from __future__ import annotations

from collections.abc import Iterator

from workbench.bricks.card import read_card
from workbench.bricks.hub import CARD, Hub
from workbench.edit.closed_form.continuing import RECORD, Earlier, edits_of, without_history
from workbench.edit.closed_form.preset import Preset
from workbench.errors import InvalidRecipeError
from workbench.files import read_json
from workbench.models.identity import tokens_digest, vocabulary_digest
from workbench.resolve.checks import read_digest, read_state
from workbench.resolve.findings import Findings
from workbench.resolve.resolved import Resolved
from workbench.steps import EditMethod


def check_streams(resolved: Resolved, hub: Hub, findings: Findings) -> None:
    """Check that each stream that is continued was solved on the weights that its step meets.

    Args:
        resolved: The recipe, with its steps bound.
        hub: Access to the hub.
        findings: Receives the checks that are left to `run`, and warnings.

    Raises:
        InvalidRecipeError: If a stream was solved on another base, with another tokenizer, or after other steps.
    """
    recipe = resolved.recipe
    for number, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
        if not isinstance(step, Preset):
            continue
        if step.preserve_steps and not any(isinstance(before, EditMethod) for before in recipe.steps[:number]):
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
    run = resolved.base_path.parent
    for place in edits_of(run) if (run / "run.json").is_file() else ():
        record = read_json(place / RECORD) or {}
        reason = without_history(record)
        text = f"starts without the history of {run.name}/edits/{place.name}, because "
        yield text + (
            reason or f"the step does not name it; to continue it, write `continues: runs/{run.name}` and the base of that run"
        )
