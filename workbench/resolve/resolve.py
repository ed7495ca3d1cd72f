"""Resolving of a recipe: locate every input, check it, and download what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from workbench.bricks.brick import Brick
from workbench.bricks.hub import FETCH, Hub
from workbench.bricks.locate import AdaptedCheckpoint, base_adapter, base_digest, resolve_base, resolve_brick
from workbench.bricks.origin import find_ties, rows_of, untied
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.parts import hook
from workbench.ground.project import cache_of
from workbench.models.identity import generation_settings
from workbench.models.layout import Model
from workbench.recipe.recipe import Recipe, load_recipe
from workbench.recipe.schema import AdaptedBase
from workbench.resolve.checks import (
    check_brick,
    check_low_rank,
    check_recipe,
    check_steps,
    read_notes,
    small_tensors,
)
from workbench.resolve.edits import check_streams, edit_warnings
from workbench.resolve.findings import Findings
from workbench.resolve.keys import distinct_keys
from workbench.resolve.output import check_form, check_format
from workbench.resolve.resolved import Resolved, brick_sources
from workbench.resolve.step_checks import check_neurons, check_parts, check_teacher, check_whole_model, tokenizer_of
from workbench.steps import Step
from workbench.steps.fields import NESTED, BrickRef
from workbench.vocabulary.fields import TokenizerFields
from workbench.vocabulary.tokens import added_tokens

if TYPE_CHECKING:
    from workbench.vocabulary.aligned import AlignedVocabulary, Member


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
    if recipe.fields.sweep is not None:
        raise recipe.error(
            ("sweep",),
            f"{recipe.name} stands for several configurations, and one is needed here",
            f"Name a point, such as '{recipe.name}[…]': `workbench recipe check` lists them. Or fix all swept fields with --set.",
        )
    if not hub.headers_only and not _above:
        ahead = resolve(recipe, replace(hub, headers_only=True))
        if not (ahead.headers_only or ahead.deferred):
            return ahead
        hub.check_space(ahead.downloads)
    return _Builder(recipe, hub, _above).build()


class _Builder:
    """Collects the inputs of a recipe and what their checks find, and builds a `Resolved` from them.

    Args:
        recipe: The recipe.
        hub: Access to the hub.
        above: Files of the recipes that use this recipe as a brick.
    """

    def __init__(self, recipe: Recipe, hub: Hub, above: tuple[Path, ...]) -> None:
        self.recipe, self.hub, self.above = recipe, hub, above
        base = recipe.fields.base
        named = base.on if isinstance(base, AdaptedBase) else recipe.fields.base_name
        self.checkpoint, self.revision = resolve_base(named, recipe.project, hub)
        packed = [(entry.packing, entry.spec.numel) for entry in self.checkpoint.entries.values() if entry.packing]
        few = any(packing.reader and 8 * packing.nbytes < 6 * numel for packing, numel in packed)
        if few and recipe.path and recipe.fields.output.format is None and (isinstance(base, str) or not base.dequantize):
            form = f"adapter: {base.adapter}, on: {named}" if isinstance(base, AdaptedBase) else f"id: {named}"
            raise recipe.error(
                ("base",),
                f"{named} stores weights in about 4 bits, and a result is in floating point",
                f"Name the 16-bit model that it was quantized from, or write `base: {{{form}, dequantize: true}}` to take the rounded weights as they are read; `output: {{format: …}}` keeps the format of some bases.",
            )
        if isinstance(base, AdaptedBase):
            adapter = resolve_brick("base", BrickRef(adapter=base.adapter), recipe.project, hub)
            self.checkpoint = AdaptedCheckpoint(self.checkpoint, adapter)
        self.on_disk: dict[str, Brick] = {}
        self.nested: dict[str, Resolved] = {}
        self.findings = Findings(warnings=read_notes(self.checkpoint))
        self.whole = recipe.whole_models
        self.teachers = recipe.teachers

    def build(self) -> Resolved:
        """Locate the bricks, check everything, and return the resolved recipe.

        Raises:
            WorkbenchError: If there is a problem. The message lists all problems.
        """
        findings = self.findings
        for name, ref in self.recipe.fields.bricks.items():
            with findings.or_problem():
                if ref.kind in NESTED:
                    self.nested[name] = self._resolve_nested(name, ref)
                else:
                    self.on_disk[name] = resolve_brick(name, ref, self.recipe.project, self.hub)
        self._keep_added_tokens()
        apart = {*self.whole, *self.teachers, self.recipe.donor}
        sources = brick_sources(self.recipe, self.on_disk, self.nested)
        merged = {name: source for name, source in sources.items() if name not in apart}
        reasons, unread = find_ties(merged, self.checkpoint, findings.deferred)
        findings.problems += unread.values()
        used = self.recipe.parents
        unties = tuple(reason for name, reason in reasons.items() if name in used)
        findings.warnings += unties
        plain = untied(self.checkpoint) if unties else Model(self.checkpoint, self.checkpoint.config)
        inputs = Resolved(
            self.recipe,
            self.checkpoint,
            plain,
            on_disk=MappingProxyType(self.on_disk),
            nested=MappingProxyType(self.nested),
            base_revision=self.revision,
            unties=unties,
            vocabulary=self._aligned(plain) if self.recipe.fields.tokenizer and not findings.problems else None,
        )
        self._check_inputs(inputs, unread)
        findings.raise_problems()
        resolved = _with_tokenizers(inputs)
        generation_settings(resolved.tokenizer_path, resolved.base.config)  # a damaged file ends here, before any work
        check_streams(resolved, self.hub, findings)
        findings.warnings += edit_warnings(resolved, self.hub, findings)
        deferred = (*self.checkpoint.deferred, *findings.deferred, *(d for b in resolved.bricks.values() for d in b.deferred))
        return replace(resolved, warnings=tuple(dict.fromkeys(findings.warnings)), deferred=deferred)

    @cached_property
    def _base_digest(self) -> str:
        """Digest of the base."""
        return base_digest(self.checkpoint, cache_of(self.recipe.project))

    def _keep_added_tokens(self) -> None:
        """Give the recipe a `tokenizer` block if bricks add tokens to the base's and it has none, so that their rows are kept."""
        fields, base, added = self.recipe.fields, self.checkpoint, list[str | None]()
        if fields.tokenizer or fields.output.form != "checkpoint" or self.whole or self.teachers:
            return
        try:
            for brick in self.on_disk.values():
                has_rows = brick.kind == "checkpoint" or brick.adapter.keys.vocabulary
                if not has_rows or brick.part or brick.name not in self.recipe.parents:
                    continue
                found = self._added_tokens(brick, Model(base, base.config))
                added.append(found if brick.kind == "checkpoint" else found or "")
        except WorkbenchError:
            return  # a check reports it
        warnings = list(filter(None, added))
        if warnings and None not in added:
            self.recipe = replace(self.recipe, fields=fields.model_copy(update={"tokenizer": TokenizerFields(source="union")}))
            self.findings.warnings += warnings

    def _added_tokens(self, brick: Brick, base: Model) -> str | None:
        """Return a warning about tokens that a brick adds to the base's; "" if it adds none, None if they differ otherwise."""
        weights, adapts = rows_of(brick, base)[0], brick.kind == "adapter"
        return added_tokens(brick.name, brick.path, weights.specs, self.checkpoint, padding=adapts)

    def _resolve_nested(self, name: str, ref: BrickRef) -> Resolved:
        """Return a resolved recipe that is used as a brick."""
        recipe, target = self.recipe, ref.target
        if ref.kind == "checkpoints":
            window, said = hook("runs", f"brick '{name}': `checkpoints:`").recipe_of(name, ref, recipe, self.hub)
            self.findings.warnings += said
            return resolve(window, self.hub, (*self.above, *([recipe.path.resolve()] if recipe.path else [])))
        path = (recipe.project / target).resolve()
        chain = (*self.above, *([recipe.path.resolve()] if recipe.path else []))
        if path in chain:
            raise InvalidRecipeError(
                f"brick '{name}': recipe {target} uses itself: " + " -> ".join(p.name for p in (*chain, path)),
                "Remove this brick from one of these recipes.",
            )
        nested = load_recipe(path)
        if nested.fields.sweep is not None:
            raise InvalidRecipeError(
                f"brick '{name}': {target} has a `sweep`, so that it stands for several configurations; a brick is one",
                f"Remove `sweep` from {target}, or write the point to use into a recipe of its own.",
            )
        inner = resolve(nested, self.hub, chain)
        if last := inner.recipe.memory or inner.recipe.router:
            step = f"`{last.verb}: {last.name}`"
            raise InvalidRecipeError(
                f"brick '{name}': {target} ends in {step}, but a {inner.beside} does not change weights and cannot be merged",
                f"Remove {step} from that recipe, and add it as the last step of this recipe.",
            )
        if name in self.whole or name in self.teachers or recipe.fields.bricks[name].any_base:
            return inner
        with self.findings.or_at_run(
            f"brick '{name}': {inner.recipe.fields.base_name} and {recipe.fields.base_name} are the same base"
        ):
            adapted = base_adapter(self.checkpoint) or base_adapter(inner.checkpoint)
            if (adapted or inner.base_path != self.checkpoint.path) and inner.base_digest != self._base_digest:
                raise WorkbenchError(
                    f"brick '{name}': {target} has the base {inner.recipe.fields.base_name}, but this recipe has {recipe.fields.base_name}",
                    "Use the same base in both recipes: a brick's delta is taken against the recipe's base.",
                )
        return inner

    def _aligned(self, base: Model) -> AlignedVocabulary:
        """Return the vocabulary that the recipe's `tokenizer` block describes."""
        from workbench.vocabulary.align import align
        from workbench.vocabulary.aligned import Member

        block, project, bricks = self.recipe.fields.tokenizer, self.recipe.project, self.on_disk
        cache = cache_of(project)
        assert block is not None
        sampled = {n: b.stamp(cache) if b.headers_only else b.fingerprint(cache) for n, b in bricks.items()}
        keys = distinct_keys(
            sampled, lambda name: bricks[name].stamp(cache) if bricks[name].headers_only else bricks[name].digest(cache)
        )
        members = [self._member(b, keys[n], base) for n, b in bricks.items()]
        vocabulary = align(block, Member("base", self.checkpoint.path, "", base.weights, base.config), members, project, cache)
        self.findings.warnings += [*vocabulary.warnings, *filter(None, [vocabulary.note()])]
        return vocabulary

    def _member(self, brick: Brick, key: str, base: Model) -> Member:
        """Return a brick whose vocabulary is aligned, or that gives its tokenizer."""
        from workbench.vocabulary.aligned import Member

        if brick.kind == "adapter" and not self._added_tokens(brick, base):
            return Member(brick.name, brick.path, key, None, None)
        if brick.name != self.recipe.donor:
            return Member(brick.name, brick.path, key, *rows_of(brick, base))
        return Member(brick.name, brick.path, key, None, brick.checkpoint.config, brick.checkpoint)

    def _check_inputs(self, inputs: Resolved, unread: Mapping[str, WorkbenchError]) -> None:
        """Check bricks and steps, and record warnings, deferred checks and problems."""
        findings, output = self.findings, self.recipe.fields.output
        if inputs.base_adapter and output.form != "checkpoint":
            findings.problems.append(
                self.recipe.error(
                    ("output", "form"),
                    f"`form: {output.form}` refers to a base on disk, but this base has an adapter on it, so no files have its weights",
                    "Write `form: checkpoint`, or run a recipe with this base and no steps, and use its result as the base.",
                )
            )
        for name in inputs.bricks:
            if name in unread or name == self.recipe.donor:
                continue
            with findings.or_problem(), findings.or_at_run(f"brick '{name}': fits the base"):
                if name in self.teachers and inputs.bricks[name].kind != "adapter":
                    check_teacher(name, inputs)
                elif name in self.whole:
                    findings.warnings += check_whole_model(name, inputs)
                elif name in self.nested:
                    findings.warnings += check_recipe(name, self.nested[name], inputs)
                else:
                    findings.warnings += check_brick(self.on_disk[name], inputs, self.hub, findings)
        findings.problems += check_parts(inputs)
        kinds = {name: brick.kind for name, brick in inputs.bricks.items()}
        findings.problems += check_steps(self.recipe, inputs.base, inputs.bricks)
        findings.problems += check_form(self.recipe, kinds)
        findings.problems += check_format(self.recipe, self.checkpoint)
        findings.problems += check_low_rank(inputs, findings)
        for step, step_id in zip(self.recipe.steps, self.recipe.step_ids, strict=True):
            told = [*step.warnings(self.recipe.used_bricks(step)), *small_tensors(step, inputs)]
            findings.warnings += [f"{step_id}: {warning}" for warning in told]
        check_neurons(inputs, self.hub, findings)


def _with_tokenizers(resolved: Resolved) -> Resolved:
    """Bind each step to the tokenizer in effect before it."""
    steps: list[Step] = []
    tokenizers: list[Path] = []
    for step in resolved.recipe.steps:
        before = tokenizers[-1] if tokenizers else resolved.tokenizer_at(0)
        bound, after = step.bind(resolved.base, before, resolved.recipe.project, resolved.cache)
        if (named := step.tokenizer_brick()) is not None:
            keeps = resolved.vocabulary is not None and getattr(step, "composes", False)
            after = before if keeps else tokenizer_of(resolved, named)
        steps.append(bound)
        tokenizers.append(after)
    if steps == list(resolved.recipe.steps) and set(tokenizers) <= {resolved.tokenizer_at(0)}:
        return resolved
    return replace(resolved, recipe=replace(resolved.recipe, steps=tuple(steps)), tokenizers=tuple(tokenizers))
