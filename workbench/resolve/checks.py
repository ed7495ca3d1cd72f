"""Checks from file headers, before any computation: bricks fit the base, and steps name existing files and tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from workbench.bricks.brick import Brick, BrickSource
from workbench.bricks.fitting import PartlyFitted, fitted
from workbench.bricks.hub import Hub
from workbench.bricks.origin import NamedBase, base_for, changes_nothing, check_integers, check_origin, recorded_digests
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import CARD
from workbench.ground.parts import hook
from workbench.models.architecture import text_parts
from workbench.models.layout import Model
from workbench.models.sentences import modules_of
from workbench.recipe.recipe import Recipe
from workbench.resolve.edits import check_edit
from workbench.resolve.findings import Findings, read_digest
from workbench.resolve.resolved import Resolved
from workbench.steps import MergeMethod, Step
from workbench.steps.fields import Where
from workbench.vocabulary.tokens import check_adapter_vocabulary, check_same_vocabulary
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.header import HeadersOnlyError, has_headers_only

if TYPE_CHECKING:
    from workbench.steps import GrowMethod


_HARMLESS = re.compile(
    r"_.*|.*dropout.*|.*drop|output_.*|.*_token_id|.*token_index|(torch_)?dtype|.*_version|use_cache|initializer_.*|architectures|auto_map|"
    r"id2label|label2id|problem_type|num_labels|vocab_size|max_position_embeddings|tie_word_embeddings|quantization_config|tokenizer_class|"
    r"pretraining_tp|name_or_path|.*aux_loss.*|.*jitter.*|router_z_loss.*|num_nextn_predict_layers|.*mtp.*|unsloth.*|gradient_checkpointing|"
    r"return_dict|chunk_size_feed_forward|is_encoder_decoder|add_cross_attention|.*_config|rope_.*|partial_rotary_factor|rotary_pct|"
    r"original_max_position_embeddings|max_window_layers"
)
"""Settings that compute the same function, or that are compared elsewhere: vocabularies, heads that are tied, and rotary settings as one."""
_ANOTHER = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
)
"""Settings with which equal tensors are those of another model."""


def check_steps(recipe: Recipe, base: Model, bricks: Mapping[str, BrickSource]) -> Iterator[WorkbenchError]:
    """Yield the errors in the steps: bad files, `where` that matches nothing, bricks of an unusable kind or for another use."""
    for i, step in enumerate(recipe.steps):
        missing = [file for file in step.files() if not (recipe.project / file).is_file()]
        for file in missing:
            yield recipe.error(("steps", i), f"{file} does not exist", "Paths start at the project folder.")
        if missing:
            continue
        try:
            step.check_inputs(recipe.project)
            if step.kind == "grow" and (train := cast("GrowMethod", step).train):
                from workbench.train.spec import TrainSpec
                from workbench.train.texts import training_texts

                training_texts(TrainSpec(**train.settings()), recipe.project / train.data, recipe.project)
        except WorkbenchError as error:
            yield error
    for i, step in enumerate(recipe.steps):
        for path, where in _where_fields(step):
            if unmatched := where.unmatched(base):
                hint = "`workbench brick show` lists tensor names; config.json has the number of layers."
                yield recipe.error(("steps", i, *path), f"{unmatched} matches no tensor of the base", hint)
    for i, step in enumerate(recipe.steps):
        used = {name: bricks[name].kind for name in recipe.used_bricks(step) if name in bricks}
        for problem in step.check_kinds(used):
            yield recipe.error(("steps", i, *problem.path), problem.message, problem.hint)
    for i, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
        for name in recipe.used_bricks(step) if step.merges else ():
            brick = bricks.get(name)
            stated = brick.card.axes.stated() if isinstance(brick, Brick) and brick.card else {}
            for axis, expected in (("routing", "none"), ("aggregation", "parameter_sum")):
                if (value := stated.get(axis, expected)) != expected:
                    message = (
                        f"brick '{name}': its card says axes.{axis}: {value}, but step '{step_id}' adds its delta to the weights"
                    )
                    hint = f"Remove `{axis}` from its {CARD}, or use the brick in a step that routes to it."
                    yield recipe.error(("steps", i, "bricks", name), message, hint)


def check_low_rank(resolved: Resolved, findings: Findings) -> Iterator[WorkbenchError]:
    """Yield an error for each brick that is no plain low-rank update, in steps that need one (`Step.low_rank_bricks`).

    The result of a recipe is checked when it has been computed, except that it must be an adapter.
    """
    recipe = resolved.recipe
    for i, step in enumerate(recipe.steps):
        for name in recipe.used_bricks(step) if step.low_rank_bricks else ():
            nested = resolved.nested.get(name)
            if nested is not None and (form := nested.recipe.fields.output.form) != "adapter":
                message = f"brick '{name}' is a recipe whose result is a {form}, but step '{recipe.step_ids[i]}' needs an adapter of the base"
                hint = f"Write `output: {{form: adapter, rank: 16}}` in recipe {nested.recipe.name}."
                yield recipe.error(("steps", i, "bricks", name), message, hint)
            brick = resolved.on_disk.get(name)
            if brick is None or brick.kind != "adapter":
                continue
            from workbench.adapters.linear import as_lora, not_linear

            with findings.or_at_run(f"brick '{name}': is a low-rank update of linear layers"):
                try:
                    found = not_linear(brick.adapter, resolved.bound(name))
                except HeadersOnlyError:
                    raise
                except WorkbenchError:
                    continue  # `check_brick` reports it
                if found:
                    target = recipe.fields.bricks[name].target
                    message = f"brick '{name}' has {found}, but step '{recipe.step_ids[i]}' needs plain LoRA on linear layers"
                    hint = f"Turn it into one: {as_lora(name, target)}"
                    yield recipe.error(("steps", i, "bricks", name), message, hint)


def small_tensors(step: Step, resolved: Resolved) -> list[str]:
    """Return where a merge takes another rule because tensors are small for so many bricks (`MergeMethod.limits`)."""
    if not isinstance(step, MergeMethod):
        return []
    names, base = resolved.recipe.used_bricks(step), resolved.base
    try:
        bound = [resolved.bound(name) for name in names if name in resolved.adapters]
    except WorkbenchError:
        return []  # `check_brick` reports it
    shapes = {
        name: spec.shape
        for name, spec in base.weights.specs.items()
        if spec.is_float
        and (len(bound) < len(names) or any(adapter.touches(name) for adapter in bound))
        and (step.where is None or step.where.matches(name, base))
    }
    ranks = {name: max([adapter.rank(name) or 0 for adapter in bound if adapter.touches(name)], default=0) for name in shapes}
    return list(step.limits(shapes, ranks, len(names)))


def check_recipe(name: str, inner: Resolved, resolved: Resolved) -> list[str]:
    """Check that a recipe used as a brick has the same vocabulary as the recipe that uses it.

    Returns:
        Warnings.

    Raises:
        WorkbenchError: If the brick recipe has a different `tokenizer` block.
    """
    mine, theirs = (r.vocabulary.digest if r.vocabulary else None for r in (resolved, inner))
    if theirs is not None and mine != theirs:
        found = "differs from this recipe's" if mine else "changes the vocabulary; this recipe has none"
        hint = "Remove the block there: this recipe aligns its rows" if mine else "Move the block here: this recipe aligns both"
        raise WorkbenchError(
            f"brick '{name}': the `tokenizer` block of recipe {inner.recipe.name} {found}", f"{hint}. Or move its steps here."
        )
    changes = inner.recipe.steps or inner.base_adapter or resolved.recipe.fields.bricks[name].any_base
    told = [] if changes else [f"brick '{name}' changes nothing: {inner.recipe.name} has no steps"]
    own = f"brick '{name}': a merge takes tensors, and leaves out the `output: {{config:}}` of {inner.recipe.name}"
    return [*told, own] if inner.recipe.fields.output.config else told


def check_brick(brick: Brick, resolved: Resolved, hub: Hub, findings: Findings) -> list[str]:
    """Check that an adapter or a checkpoint fits the base, and return warnings.

    Raises:
        WorkbenchError: If its tensors, vocabulary or recorded base do not fit.
    """
    plain, vocabulary, recipe = resolved.checkpoint, resolved.vocabulary, resolved.recipe
    warnings = list[str]()
    if modules_of(brick.path)[1] and not brick.part:
        sentences = hook("sentences", f"{brick.label}, a model of sentence-transformers,")
        warnings += sentences.compare_modules(brick.label, brick.path, plain.path)
    if brick.kind == "adapter":
        from workbench.adapters.bind import bind

        own = vocabulary.adapted(brick.name) if vocabulary else None
        base = own.base if own else resolved.plain if brick.name in resolved.parents else base_for([brick], plain)
        bound = bind(brick.adapter, base.weights.specs, base)
        warnings += bound.notes
        with findings.or_at_run(f"{brick.label}: the edit was solved on this base"):
            check_edit(brick, resolved, hub)
        differences = check_adapter_vocabulary(brick.name, brick.path, bound.places, plain.path, plain.specs)
        warnings += [] if vocabulary else differences
    else:
        if vocabulary is None:
            warnings += check_same_vocabulary(brick.name, brick.path, brick.checkpoint.specs, plain.path, plain.specs)
        base = resolved.base if vocabulary or brick.name in resolved.parents else base_for([brick], plain)
        weights = fitted(brick, base, vocabulary.view(brick.name) if vocabulary else None)
        if not recipe.fields.bricks[brick.name].any_base:
            check_same_model(brick, plain)
        warnings += read_notes(brick.checkpoint) + compare_configs(brick, plain)
        warnings += weights.notes(brick.label) if isinstance(weights, PartlyFitted) else []
        with findings.or_at_run(f"{brick.label}: its integer tensors equal the base's"):
            warnings += check_integers(brick, plain, weights)
    digest = None
    if recorded_digests(brick):
        with findings.or_at_run(f"{brick.label}: the base has the weights that the brick's card records"):
            digest = read_digest(resolved, hub)
    named = NamedBase(recipe.fields.base_name, resolved.base_path, Model(plain, plain.config), digest)
    warnings += check_origin(brick, named, recipe.project, any_base=recipe.fields.bricks[brick.name].any_base)
    if not brick.headers_only and not has_headers_only(plain.path) and changes_nothing(brick, base, resolved.cache):
        warnings.append(f"{brick.label} changes nothing: every tensor of its delta is zero")
    return warnings


def read_notes(checkpoint: Checkpoint) -> list[str]:
    """Return warnings on what a checkpoint stores otherwise than the model uses it: buffers, and weights in fewer bits."""
    names, notes = checkpoint.left_out, [f"{checkpoint.label}: {note}" for note in checkpoint.notes]
    text = (
        f"{checkpoint.label}: skips {len(names)} stored buffers ({', '.join(names[:1])}, …), which transformers computes itself"
    )
    return [*([text] if names else []), *notes]


def compare_configs(brick: Brick, checkpoint: Checkpoint) -> list[str]:
    """Return a warning about settings in config.json that give equal weights another meaning than in the base.

    What one file leaves out has the default of transformers' class.
    """
    changed = [key for key, *_ in _changed(brick, checkpoint)]
    text = f"{brick.label}: config.json differs from the base's in {', '.join(changed)}; the result has the base's values"
    return [text] if changed else []


def check_same_model(brick: Brick, checkpoint: Checkpoint) -> None:
    """Raise WorkbenchError if a brick's settings make equal tensors another model: heads of other counts, or another activation."""
    for key, mine, theirs in _changed(brick, checkpoint):
        if key in _ANOTHER:
            raise WorkbenchError(
                f"{brick.label}: config.json has {key} {mine}, the base has {theirs}: with equal shapes these are different models",
                "Use a fine-tune of this base. To merge them nevertheless, add `any_base: true` to the brick.",
            )


def _changed(brick: Brick, checkpoint: Checkpoint) -> Iterator[tuple[str, object, object]]:
    """Yield (setting, the brick's value, the base's) where they differ; defaults are filled in only if the files differ."""
    configs = brick.checkpoint.config, checkpoint.config
    mine, theirs = (_meaning(config, images=brick.part is None) for config in configs)
    if mine == theirs:
        return
    if mine.keys() ^ theirs.keys():
        with suppress(WorkbenchError):  # transformers does not know the model: what both files say is compared
            mine, theirs = (_meaning(_filled(config), images=brick.part is None) for config in configs)
    yield from ((key, mine[key], theirs[key]) for key in sorted(mine.keys() & theirs.keys()) if mine[key] != theirs[key])


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the defaults of its class."""
    from workbench.models.skeleton import parse_config

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    filled: dict[str, Any] = parse_config(plain).to_dict()
    return filled


def _meaning(config: Mapping[str, Any], *, images: bool) -> dict[str, object]:
    """Return the settings that count, with rotary settings in one form for all versions of transformers."""
    config = {key: value for part in text_parts(config) for key, value in part.items()}
    fields = {key: value for key, value in config.items() if not _HARMLESS.fullmatch(key) and value is not None}
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    rope = {key: config[key] for key in ("partial_rotary_factor", "rotary_pct") if config.get(key) is not None} | dict(rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("rope_theta") is not None:
        settings = {k: v for k, v in rope.items() if k not in ("type", "rope_type") and (images or not k.startswith("mrope"))}
        fields["rope"] = {**settings, "rope_type": "default" if kind == "mrope" and not images else kind}
    return fields


def _where_fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Where]]:
    """Yield every `where` in a value, with its path."""
    if isinstance(value, Where):
        yield path, value
    elif isinstance(value, Step) and path:
        return  # a merge within a step, whose layers are counted within its slice: the step checks it
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield from _where_fields(getattr(value, name), (*path, field.alias or name))
        yield from _where_fields(value.model_extra or {}, path)
    elif isinstance(value, (dict, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _where_fields(inner, (*path, key))
