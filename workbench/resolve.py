"""A recipe with every reference resolved: files, digests, and the keys that name what each step computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from workbench.bricks import (
    Brick,
    check_checkpoint,
    checkpoint_digest,
    compare_configs,
    resolve_base,
    resolve_brick,
    vocabulary_digest,
)
from workbench.errors import WorkbenchError
from workbench.fields import Where, parse_size
from workbench.hub import FETCH, Hub
from workbench.layout import Model
from workbench.merge.core import wants_core
from workbench.recipe import Recipe, dump_step, dump_steps, load_recipe
from workbench.registry import EditMethod, MergeMethod
from workbench.standins import CACHE, Download, download_of
from workbench.vocabulary.align import Member, Vocabulary, align
from workbench.vocabulary.check import check_adapter_vocabulary, check_same_vocabulary, with_vocabulary_hint
from workbench.weights.checkpoint import Checkpoint, HeadersOnlyError, is_stand_in
from workbench.weights.digests import digests_known, entry_digest, file_digest, json_digest, read_json, stamp


@dataclass(frozen=True)
class Resolved:
    """A recipe whose inputs are there and fit.

    Attributes:
        recipe: As written.
        checkpoint: The base as it lies on disk.
        bricks: Name -> files, or another resolved recipe.
        base_revision: Its commit, if it comes from the hub.
        warnings: What the user should know, and the run records.
        vocabulary: What the recipe's `tokenizer` block means; `base` and checkpoint bricks then have its rows.
        deferred: Checks that need tensors of which only headers are here; `run` makes them.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    bricks: dict[str, Brick | Resolved]
    base_revision: str | None = None
    warnings: list[str] = field(default_factory=list)
    vocabulary: Vocabulary | None = None
    deferred: list[str] = field(default_factory=list)

    @cached_property
    def downloads(self) -> list[Download]:
        """What `run` fetches from the hub first: base and bricks of which only headers are here, each repository once."""
        found = [download_of(self.base_path)]
        for brick in self.bricks.values():
            found += brick.downloads if isinstance(brick, Resolved) else [download_of(brick.path)]
        return list(dict.fromkeys(filter(None, found)))

    @property
    def headers_only(self) -> bool:
        """Whether it can be planned but not run: tensors of some input are not here."""
        return is_stand_in(self.base_path) or any(b.headers_only for b in self.bricks.values())

    @property
    def tokenizer_path(self) -> Path:
        """Directory with the tokenizer and generation_config.json of the configuration."""
        return self.vocabulary.path if self.vocabulary else self.base_path

    @cached_property
    def base(self) -> Model:
        """The base's lazy weights and configuration: what deltas refer to."""
        return self.vocabulary.base if self.vocabulary else Model(self.checkpoint, self.checkpoint.config)

    @property
    def base_path(self) -> Path:
        """The base's directory."""
        return self.checkpoint.path

    @property
    def cache(self) -> Path:
        """The project's cache."""
        return self.recipe.project / CACHE

    @cached_property
    def base_digest(self) -> str:
        """Digest of the base's weights and configuration. Reads what no one has read before."""
        return checkpoint_digest(self.checkpoint, self.cache)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Brick name -> digest of its content, or the other recipe's key. Reads what no one has read before."""
        return {n: b.key if isinstance(b, Resolved) else b.digest(self.cache) for n, b in self.bricks.items()}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Brick name -> a key of its content that costs a sample: it orders bricks and seeds random masks."""
        return {
            n: json_digest([sorted(b.fingerprints.items()), dump_steps(b.recipe), *b._rows(b.fingerprints)]) if isinstance(b, Resolved) else b.fingerprint(self.cache)
            for n, b in self.bricks.items()
        }  # fmt: skip

    @property
    def known(self) -> bool:
        """Whether every key and digest is at hand without reading the inputs' tensors."""
        return digests_known(self.checkpoint.entries, self.cache) and all(
            b.known if isinstance(b, Resolved) else b.known(self.cache) for b in self.bricks.values()
        )

    @cached_property
    def stamp(self) -> str:
        """What stands for `run_key` until the inputs have been read: files by path, size and time of modification."""
        bricks = {n: b.stamp if isinstance(b, Resolved) else b.stamp(self.cache) for n, b in self.bricks.items()}
        output = self.recipe.fields.output.model_dump(mode="json")
        return self._chain([stamp(self.checkpoint.entries), output, *self._rows(bricks)], bricks)[-1]

    def _rows(self, bricks: Mapping[str, str]) -> list[Any]:
        """What the base's rows depend on with a `tokenizer` block: all vocabularies, and bricks that rows are taken from."""
        return (
            [self.vocabulary.digest, [[m.name, bricks[m.name]] for m in self.vocabulary.members[1:]]] if self.vocabulary else []
        )

    @cached_property
    def keys(self) -> list[str]:
        """Key of the state after each step: all that its numbers depend on."""
        return self._chain(["base", self.base_digest, *self._rows(self.digests)], self.digests)[1:]

    def _chain(self, base: list[Any], bricks: Mapping[str, str]) -> list[str]:
        """Keys of the states before the first step and after each."""
        keys = [json_digest(base)]
        for step in self.recipe.steps:
            parts: list[Any] = [keys[-1], dump_step(step), type(step).version]
            if isinstance(step, MergeMethod):
                parts.append([[name, bricks[name]] for name in self.recipe.used_bricks(step)])
                parts += [self.recipe.fields.seed] if step.laws.random else []
            elif isinstance(step, EditMethod):
                parts.append([file_digest(self.recipe.project / f) for f in step.inputs()])
                parts.append([self.recipe.fields.seed, vocabulary_digest(self.tokenizer_path)])
            keys.append(json_digest(parts))
        return keys

    @cached_property
    def key(self) -> str:
        """Key of the configuration: the last step's, and the dtype of the output."""
        last = self._chain(["base", self.base_digest, *self._rows(self.digests)], self.digests)[-1]
        return json_digest([last, self.recipe.fields.output.dtype])

    @property
    def run_key(self) -> str:
        """Key of the run directory: the configuration's, and the layout of its files."""
        return json_digest([self.key, parse_size(self.recipe.fields.output.shard_size)])

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the output's floats; None keeps the base's."""
        name = self.recipe.fields.output.dtype
        return getattr(torch, name) if name else None

    @property
    def parents(self) -> list[str]:
        """Bricks that merge steps use, in the recipe's order."""
        used = {n for s in self.recipe.steps if isinstance(s, MergeMethod) for n in self.recipe.used_bricks(s)}
        return [name for name in self.recipe.fields.bricks if name in used]


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
    problems: list[WorkbenchError] = []
    for name, ref in recipe.fields.bricks.items():
        try:
            if ref.kind == "recipe":
                found.bricks[name] = _inner(found, name, ref.target, hub, _above)
            else:
                found.bricks[name] = resolve_brick(name, ref, recipe.project, hub)
        except WorkbenchError as error:
            problems.append(error)
    if recipe.fields.tokenizer and not problems:
        found = replace(found, vocabulary=_aligned(found))
    for name, there in found.bricks.items():
        try:
            with _or_at_run(found, f"brick '{name}': fits the base"):
                found.warnings.extend(
                    _check(there, found, hub) if isinstance(there, Brick) else _check_recipe(name, there, found)
                )
        except WorkbenchError as error:
            problems.append(error)
    problems += [*_missing_inputs(recipe), *_check_places(recipe, found.base), *_check_spaces(recipe, found.bricks)]
    if problems:
        raise _all(problems)
    for there in found.bricks.values():
        if isinstance(there, Resolved):
            found.deferred.extend(there.deferred)
        elif there.kind == "checkpoint":
            found.deferred.extend(there.checkpoint.deferred)
    found.deferred[:0] = checkpoint.deferred
    return found


@contextmanager
def _or_at_run(resolved: Resolved, what: str) -> Iterator[None]:
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


def _aligned(resolved: Resolved) -> Vocabulary:
    """The output's vocabulary, as the recipe's `tokenizer` block says."""
    block, cache, base = resolved.recipe.fields.tokenizer, resolved.cache, resolved.checkpoint
    assert block is not None
    members = [
        Member(
            name,
            b.path,
            b.stamp(cache) if b.headers_only else b.fingerprint(cache),
            *((b.checkpoint, b.checkpoint.config) if b.kind == "checkpoint" else (None, None)),
        )
        for name, b in resolved.bricks.items()
        if isinstance(b, Brick)
    ]
    found = align(block, Member("base", base.path, "", base, base.config), members, resolved.recipe.project, cache)
    resolved.warnings.extend([*found.warnings, *filter(None, [found.note()])])
    return found


def _check_recipe(name: str, inner: Resolved, resolved: Resolved) -> list[str]:
    """Whether a recipe's result as a brick has rows that are known here: the base's, or those of an equal `tokenizer` block."""
    mine, theirs = (r.vocabulary.digest if r.vocabulary else None for r in (resolved, inner))
    if theirs is not None and mine != theirs:
        raise WorkbenchError(
            f"brick '{name}': {inner.recipe.name} has a `tokenizer` block of its own, so its rows are not this recipe's",
            "Leave the block out there (rows are aligned here), or put its steps into this recipe.",
        )
    return []


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
    with _or_at_run(outer, f"brick '{name}': {inner.recipe.fields.base} and {recipe.fields.base} are one base"):
        if inner.base_path != outer.base_path and inner.base_digest != outer.base_digest:
            raise WorkbenchError(
                f"brick '{name}': {target} has the base {inner.recipe.fields.base}, this recipe {recipe.fields.base}",
                "A brick's delta refers to the recipe's base: use the same one.",
            )
    return inner


def _check(brick: Brick, resolved: Resolved, hub: Hub) -> list[str]:
    """Whether a brick fits; returns what is worth a warning."""
    warnings: list[str] = []
    plain, vocabulary = resolved.checkpoint, resolved.vocabulary
    if brick.kind == "adapter":
        try:
            places = brick.adapter.bind(plain.specs).places
        except WorkbenchError as error:
            raise with_vocabulary_hint(error, brick.name, brick.path, plain.path) from None
        with _or_at_run(resolved, f"{brick.label}: the edit was solved on this base"):
            warnings += _edit_warnings(brick, resolved, hub)
        if vocabulary is None:
            warnings += check_adapter_vocabulary(brick.name, brick.path, places, plain.path, plain.specs)
    else:
        if vocabulary is None:
            warnings += check_same_vocabulary(brick.name, brick.path, brick.checkpoint.specs, plain.path, plain.specs)
        check_checkpoint(brick, resolved.base, vocabulary.view(brick.name) if vocabulary else None)
        with _or_at_run(resolved, f"{brick.label}: its integer tensors are the base's"):
            _check_constants(brick, plain)
        warnings += compare_configs(brick, plain)
    recorded = brick.card.base.digest if brick.card else None
    with _or_at_run(resolved, f"{brick.label}: made on the weights of this base, as its card says"):
        if recorded and recorded != _read_digest(resolved, hub):
            warnings.append(
                f"{brick.label} was made on other weights than this base ({recorded[:10]}, here {resolved.base_digest[:10]}): "
                "its delta transfers approximately"
            )
    return warnings


def _check_constants(brick: Brick, checkpoint: Checkpoint) -> None:
    """Integer tensors of a checkpoint must be the base's."""
    for name, entry in checkpoint.entries.items():
        if not entry.spec.is_float and entry_digest(entry) != entry_digest(brick.checkpoint.entries[name]):
            raise WorkbenchError(
                f"{brick.label}: the integer tensor {name} differs from the base's; only floating point is merged",
                "Use a fine-tune that leaves it alone.",
            )


def _edit_warnings(brick: Brick, resolved: Resolved, hub: Hub) -> list[str]:
    """An edit's adapter as a brick: exact on the weights that it was solved on, a plain delta elsewhere."""
    record = read_json(brick.path / "edit.json")
    if not isinstance(record, dict) or "solved_on" not in record:
        return []
    if record.get("base") != _read_digest(resolved, hub):
        raise WorkbenchError(
            f"{brick.label}: an edit of another base ({str(record.get('base'))[:10]}, here {resolved.base_digest[:10]})",
            "Solve it again on this base: an `edit` step with the same facts.",
        )
    return [f"{brick.label}: an edit, exact on the weights it was solved on; added to others it is an approximation"]


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


def _check_spaces(recipe: Recipe, bricks: Mapping[str, Brick | Resolved]) -> list[WorkbenchError]:
    """The core space is that of stacked LoRA factors: no brick of such a step is a checkpoint or a recipe's result."""
    problems = []
    for i, step in enumerate(recipe.steps):
        if not isinstance(step, MergeMethod) or not wants_core(step):
            continue
        for name in recipe.used_bricks(step):
            brick = bricks.get(name)
            kind = "recipe" if isinstance(brick, Resolved) else brick.kind if brick else "adapter"
            if kind != "adapter":
                problems.append(
                    recipe.error(
                        ("steps", i, "space"),
                        f"brick '{name}' is a {kind}: `space: core` merges the factors of LoRA adapters",
                        "Set `space: full`, or make an adapter of it: `workbench brick extract`.",
                    )
                )
    return problems


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Where]]:
    """Every `where` below a step's field, with its path."""
    if isinstance(value, Where):
        yield path, value
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield from _places(getattr(value, name), (*path, field.alias or name))
    elif isinstance(value, (dict, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _missing_inputs(recipe: Recipe) -> list[WorkbenchError]:
    found = []
    for i, step in enumerate(recipe.steps):
        for file in step.inputs() if isinstance(step, EditMethod) else ():
            if not (recipe.project / file).is_file():
                found.append(recipe.error(("steps", i), f"{file} does not exist", "Paths start at the project folder."))
    return found
