"""Whether bricks fit the base and steps name what is there: checks from headers, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from workbench.adapters.bind import bind
from workbench.bricks.brick import Brick, fitted
from workbench.bricks.hub import Hub
from workbench.bricks.integers import check_integers
from workbench.bricks.origin import NamedBase, changes_nothing, check_origin, recorded_digests
from workbench.bricks.tied import base_for
from workbench.errors import WorkbenchError, shell
from workbench.files import read_json
from workbench.models.layout import Model
from workbench.recipe.recipe import Recipe
from workbench.steps.fields import Where
from workbench.train import TrainSpec, training_texts
from workbench.vocabulary.check import check_adapter_vocabulary, check_same_vocabulary, with_vocabulary_hint
from workbench.weights.checkpoint import Checkpoint, HeadersOnlyError
from workbench.weights.digests import digests_known
from workbench.weights.foreign import is_stand_in

if TYPE_CHECKING:
    from workbench.resolve.resolved import Resolved

# Fields of config.json that change what equal weights compute.
_SHARED = frozenset({
    "model_type", "hidden_act", "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "layer_types", "attention_bias",
    "logit_scale", "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling",
})  # fmt: skip


def check_steps(recipe: Recipe, base: Model, bricks: Mapping[str, Brick | Resolved]) -> list[WorkbenchError]:
    """Return what is wrong with the steps: missing files, `where` that matches nothing, bricks of a kind that a step cannot take."""
    return [*_check_files(recipe), *_check_places(recipe, base), *_check_kinds(recipe, bricks)]


def check_recipe(name: str, inner: Resolved, resolved: Resolved) -> list[str]:
    """Whether a recipe's result as a brick has rows that are known here: the base's, or those of an equal `tokenizer` block."""
    mine, theirs = (r.vocabulary.digest if r.vocabulary else None for r in (resolved, inner))
    if theirs is not None and mine != theirs:
        raise WorkbenchError(
            f"brick '{name}': {inner.recipe.name} has a `tokenizer` block of its own, so its rows are not this recipe's",
            "Leave the block out there (rows are aligned here), or put its steps into this recipe.",
        )
    return [] if inner.recipe.steps else [f"brick '{name}' changes nothing: {inner.recipe.name} has no steps"]


@contextmanager
def or_at_run(resolved: Resolved, what: str) -> Iterator[None]:
    """Put off a check that needs tensors which are not here."""
    try:
        yield
    except HeadersOnlyError:
        resolved.deferred.append(what)


def _read_digest(resolved: Resolved, hub: Hub) -> str:
    """The base's digest. Errors: `HeadersOnlyError` where headers have to do and it has not been read before."""
    if hub.headers_only and not digests_known(resolved.checkpoint.entries, resolved.cache):
        raise HeadersOnlyError(f"{resolved.base_path}: its tensors have not been read yet")
    return resolved.base_digest


def check_brick(brick: Brick, resolved: Resolved, hub: Hub) -> list[str]:
    """Whether a brick fits; returns what is worth a warning."""
    warnings: list[str] = []
    plain, vocabulary = resolved.checkpoint, resolved.vocabulary
    if brick.kind == "adapter":
        seen = resolved.plain if brick.name in resolved.parents else base_for([brick], plain)
        try:
            bound = bind(brick.adapter, seen.weights.specs, seen)
        except HeadersOnlyError:
            raise
        except WorkbenchError as error:
            raise with_vocabulary_hint(error, brick.name, brick.path, plain.path) from None
        warnings += bound.notes
        with or_at_run(resolved, f"{brick.label}: the edit was solved on this base"):
            _check_edit(brick, resolved, hub)
        if vocabulary is None:
            warnings += check_adapter_vocabulary(brick.name, brick.path, bound.places, plain.path, plain.specs)
    else:
        if vocabulary is None:
            warnings += check_same_vocabulary(brick.name, brick.path, brick.checkpoint.specs, plain.path, plain.specs)
        seen = resolved.base if vocabulary or brick.name in resolved.parents else base_for([brick], plain)
        weights = fitted(brick, seen, vocabulary.view(brick.name) if vocabulary else None)
        warnings += buffers_left_out(brick.checkpoint) + _compare_configs(brick, plain)
        with or_at_run(resolved, f"{brick.label}: its integer tensors are the base's"):
            warnings += check_integers(brick, plain, weights)
    warnings += _check_origin(brick, resolved, hub)
    if not brick.headers_only and not is_stand_in(plain.path) and changes_nothing(brick, seen, resolved.cache):
        warnings.append(f"{brick.label} changes nothing: every tensor of its delta is zero")
    return warnings


def _check_origin(brick: Brick, resolved: Resolved, hub: Hub) -> list[str]:
    """Return warnings about the base that a brick was made on. Raises WorkbenchError if evidence contradicts the recipe's base."""
    digest = None
    if recorded_digests(brick):
        with or_at_run(resolved, f"{brick.label}: made on the weights of this base, as its card says"):
            digest = _read_digest(resolved, hub)
    recipe = resolved.recipe
    base = NamedBase(recipe.fields.base, resolved.base_path, Model(resolved.checkpoint, resolved.checkpoint.config), digest)
    return check_origin(brick, base, recipe.project, any_base=recipe.fields.bricks[brick.name].any_base)


def buffers_left_out(checkpoint: Checkpoint) -> list[str]:
    """A word on stored buffers."""
    names = checkpoint.left_out
    text = f"{checkpoint.label}: {len(names)} stored buffers are left out ({', '.join(names[:1])}, …): transformers makes them itself"
    return [text] if names else []


def _compare_configs(brick: Brick, checkpoint: Checkpoint) -> list[str]:
    mine, theirs = _meaning(brick.checkpoint.config), _meaning(checkpoint.config)
    changed = sorted(k for k in set(mine) & set(theirs) if mine[k] != theirs[k])
    return (
        [f"{brick.label}: config.json differs from the base's in {', '.join(changed)}; the base's is written"] if changed else []
    )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the fields in `_SHARED`; rotary settings in one form, whichever transformers wrote them."""
    config = {**config, **(config.get("text_config") or {})}
    found = {key: config[key] for key in _SHARED if key in config}
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("rope_theta") is not None:
        found["rope"] = {**{k: v for k, v in rope.items() if k not in ("type", "rope_type")}, "rope_type": kind}
    return found


def edit_record(brick: Brick | Resolved) -> dict[str, Any] | None:
    """What an edit brick's record says of how it was solved; None for other bricks."""
    record = read_json(brick.path / "edit.json") if isinstance(brick, Brick) else None
    return record if isinstance(record, dict) and "solved_on" in record else None


def _check_edit(brick: Brick, resolved: Resolved, hub: Hub) -> None:
    """Errors: an edit of another base."""
    record = edit_record(brick)
    if record is not None and record.get("base") != _read_digest(resolved, hub):
        raise WorkbenchError(
            f"{brick.label}: an edit of another base ({str(record.get('base'))[:10]}, here {resolved.base_digest[:10]})",
            f"Solve it on this base: `{_rebase(brick, resolved, resolved.recipe.fields.base)}`.",
        )


def edit_warnings(resolved: Resolved, hub: Hub) -> list[str]:
    """Edit bricks that steps add to other weights than those they were solved on, or not alone and whole: there, facts may get lost."""
    warnings: list[str] = []
    recipe = resolved.recipe
    for name, brick in resolved.bricks.items():
        record = edit_record(brick)
        if record is None or not isinstance(brick, Brick):
            continue
        for i, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
            if not step.merges or name not in recipe.used_bricks(step):
                continue
            with or_at_run(resolved, f"{brick.label}: the edit was solved on the weights that step '{step_id}' adds it to"):
                if reason := _inexact(record, name, resolved, i, hub):
                    warnings.append(f"{brick.label}: an edit, {reason}. {_survival(brick, resolved)}")
                    break
    return warnings


def _inexact(record: Mapping[str, Any], name: str, resolved: Resolved, number: int, hub: Hub) -> str | None:
    """Why an edit is a plain delta in a merge step; None where the step adds it, whole, to the weights that it was solved on."""
    step, step_id = resolved.recipe.steps[number], resolved.recipe.step_ids[number]
    if altered := step.alters(name, resolved.recipe.used_bricks(step), step_id):
        return altered
    if _read_state(resolved, number, hub) != record.get("solved_after"):
        return f"solved on other weights of this base than step '{step_id}' adds it to"
    return None


def _read_state(resolved: Resolved, steps: int, hub: Hub) -> str:
    """`Resolved.state`. Errors: `HeadersOnlyError` where headers have to do and something has not been read before."""
    _read_digest(resolved, hub)
    for name, brick in resolved.bricks.items():
        if hub.headers_only and not (brick.known(resolved.cache) if isinstance(brick, Brick) else brick.known):
            raise HeadersOnlyError(f"brick '{name}': its tensors have not been read yet")
    return resolved.state(steps)


def _survival(brick: Brick, resolved: Resolved) -> str:
    """How many facts survive, and how they are solved again."""
    recipe, target = str(resolved.recipe.path or "RECIPE"), resolved.recipe.fields.bricks[brick.name].target
    text = "As a delta it may lose facts"
    if (brick.path / "facts.jsonl").is_file():
        text += f": `{shell('workbench', 'eval', recipe, '--suite', f'facts:{target}/facts.jsonl')}` measures how many survive"
    return f"{text}; solve it again on the result, as a last step of its own: `{_rebase(brick, resolved, recipe)}`"


def _rebase(brick: Brick, resolved: Resolved, onto: str) -> str:
    target = resolved.recipe.fields.bricks[brick.name].target
    return shell("workbench", "edit", "rebase", target, "--onto", onto, "-o", f"bricks/{brick.name}-rebased")


def _check_places(recipe: Recipe, base: Model) -> list[WorkbenchError]:
    """Every `where` of every step names something: each glob a tensor, each slice a layer."""
    problems = []
    for i, step in enumerate(recipe.steps):
        for path, where in _places(step):
            if unmatched := where.unmatched(base):
                problems.append(
                    recipe.error(
                        ("steps", i, *path),
                        f"{unmatched} matches no tensor of the base",
                        "`workbench brick show` and config.json name tensors and layers.",
                    )
                )
    return problems


def _check_kinds(recipe: Recipe, bricks: Mapping[str, Brick | Resolved]) -> list[WorkbenchError]:
    """Return the steps that take bricks of a kind that they cannot use."""
    kinds = {name: brick.kind if isinstance(brick, Brick) else "recipe" for name, brick in bricks.items()}
    problems = []
    for i, step in enumerate(recipe.steps):
        used = {name: kinds[name] for name in recipe.used_bricks(step) if name in kinds}
        problems += [recipe.error(("steps", i, *p.path), p.message, p.hint) for p in step.check_kinds(used)]
    return problems


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Where]]:
    """Every `where` below a step's field, with its path."""
    if isinstance(value, Where):
        yield path, value
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield from _places(getattr(value, name), (*path, field.alias or name))
        yield from _places(value.model_extra or {}, path)
    elif isinstance(value, (dict, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _check_files(recipe: Recipe) -> list[WorkbenchError]:
    """Return the files of steps that are missing or that cannot be used."""
    problems = []
    for i, step in enumerate(recipe.steps):
        missing = [file for file in step.files() if not (recipe.project / file).is_file()]
        problems += [
            recipe.error(("steps", i), f"{file} does not exist", "Paths start at the project folder.") for file in missing
        ]
        if missing:
            continue
        try:
            step.check_inputs(recipe.project)
            if training := step.training:
                training_texts(TrainSpec(**training.settings()), recipe.project / training.data, recipe.project)
        except WorkbenchError as error:
            problems.append(error)
    return problems
