"""Recipes: what users write, validated strictly, and the project that they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from workbench import yamldoc
from workbench.errors import WorkbenchError, nearest
from workbench.project import find_project
from workbench.recipe.eval_fields import FactsEval, InlineEval
from workbench.recipe.schema import Output, RecipeFields, recipe_model, recipe_schema
from workbench.steps import Step, verbs
from workbench.vocabulary.fields import TokenRow


@dataclass(frozen=True)
class Recipe:
    """A valid recipe and where it comes from.

    Attributes:
        fields: What the file says.
        steps: Its steps.
        path: The file; None for one made in code.
        settings: What `--set` changed.
        project: Folder that relative paths start from, and below which runs and cache are written.
        document: The file's marks, for errors found later than validation.
    """

    fields: RecipeFields
    steps: tuple[Step, ...]
    project: Path
    path: Path | None = None
    document: yamldoc.Document | None = field(default=None, compare=False, repr=False)
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.fields.name or (self.path.stem if self.path else "recipe")

    @property
    def memory(self) -> Step | None:
        """The step of a memory that the recipe ends in, if it does."""
        last = self.steps[-1] if self.steps else None
        return last if last and last.ends_recipe else None

    @cached_property
    def step_ids(self) -> list[str]:
        """One name a step: its id, or verb and method, numbered where that is not unique."""
        taken = {step.id for step in self.steps if step.id}
        plain = [f"{step.verb}-{step.name}" for step in self.steps]
        found: list[str] = []
        for i, (step, name) in enumerate(zip(self.steps, plain, strict=True)):
            number = name if plain.count(name) == 1 and name not in taken else f"{name}-{i}"
            while number in taken and not step.id:
                number += "-"
            found.append(step.id or number)
            taken.add(found[-1])
        return found

    def used_bricks(self, step: Step) -> list[str]:
        """Return the bricks that a step takes, in order: those that it lists, or, for a merge that lists none, all of the recipe."""
        names = step.names()
        return list(self.fields.bricks) if names is None else names

    def error(self, path: yamldoc.KeyPath, message: str, hint: str | None = None) -> WorkbenchError:
        """An error at a place of the recipe."""
        if self.document:
            return self.document.error(path, message, hint)
        return WorkbenchError(f"recipe {self.name}: {message}", hint, 2)

    def without_search(self) -> Recipe:
        """The same recipe as it stands, for everything but the search."""
        return replace(self, fields=self.fields.model_copy(update={"search": None}))

    def derive(self, name: str, steps: Iterable[Mapping[str, Any]], bricks: Iterable[str] = ()) -> Recipe:
        """A recipe on the same base with other steps, for controls: the base, a brick alone, their average."""
        block = self.fields.tokenizer
        # The vocabulary depends on all bricks: without some, rows would stand for other tokens.
        keep = set(self.fields.bricks) if block else set(bricks)
        data = {
            "version": 1, "name": name, "base": self.fields.base, "steps": list(steps), "seed": self.fields.seed,
            "bricks": {n: {b.kind: b.target} for n, b in self.fields.bricks.items() if n in keep},
            "output": self.fields.output.model_dump(exclude_none=True, exclude={"form"}) if self.fields.output.form != "adapter" else {},
            **({"tokenizer": block.model_dump(exclude_none=True)} if block else {}),
        }  # fmt: skip
        return from_data(data, self.project)


def load_recipe(path: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: The file.
        settings: Overrides "field=value" or "step.field=value" (`--set`); a step by its id or index.
    """
    path = Path(path)
    document = yamldoc.load(path)
    if not isinstance(document.data, dict):
        raise WorkbenchError(
            f"{document.path}: expected a mapping with version, base, bricks and steps",
            "`workbench recipe new recipes/NAME.yaml` writes one to start from.",
            2,
        )
    settings = tuple(settings)
    for setting in settings:
        _override(document, setting)
    return _from_document(document, find_project(path), path, settings)


def from_data(data: Mapping[str, Any], project: Path) -> Recipe:
    """A recipe from plain data, as if it stood in the project's `recipes/`."""
    return _from_document(yamldoc.Document(json.loads(json.dumps(data)), {}, f"recipe {data.get('name', '')}"), project, None)


def _from_document(document: yamldoc.Document, project: Path, path: Path | None, settings: tuple[str, ...] = ()) -> Recipe:
    fields = _with_form(document.validate(recipe_model()))
    recipe = Recipe(fields, tuple(fields.steps), project, path, document if path else None, settings)  # type: ignore[attr-defined]
    _check_references(recipe)
    return recipe


def _with_form(fields: RecipeFields) -> RecipeFields:
    """A recipe that ends in a memory writes a configuration, unless it says something else, which `_check_memories` refuses."""
    steps, output = fields.steps, fields.output  # type: ignore[attr-defined]
    if "form" in output.model_fields_set or not (steps and steps[-1].ends_recipe):
        return fields
    return fields.model_copy(update={"output": output.model_copy(update={"form": "configuration"})})


def _check_memories(recipe: Recipe) -> None:
    """A memory ends a recipe, and its result is a configuration."""
    form = recipe.fields.output.form
    for i, step in enumerate(recipe.steps[:-1]):
        if step.ends_recipe:
            raise recipe.error(
                ("steps", i + 1),
                f"a step after `edit: {step.name}`, whose memory acts on the live model and leaves no weights to work on",
                f"Put `edit: {step.name}` last.",
            )
    if recipe.memory and form != "configuration":
        raise recipe.error(
            ("output", "form"),
            f"the recipe ends in `edit: {recipe.memory.name}`, and a memory does not fit into {'a checkpoint' if form == 'checkpoint' else 'an adapter'}",
            "Leave `form` out: `run` writes a configuration directory, and `workbench.load(DIR)` gives its model.",
        )
    if form == "configuration" and not recipe.memory:
        raise recipe.error(
            ("output", "form"),
            "a configuration holds a memory, and no step makes one",
            "End the recipe in one, or write `form: checkpoint`.",
        )


def _check_references(recipe: Recipe) -> None:
    """What one field says of another: bricks that exist, at least one a merge, ids that differ."""
    _check_tokenizer(recipe)
    _check_memories(recipe)
    for i, step in enumerate(recipe.steps):
        for problem in step.check_names(recipe.used_bricks(step), list(recipe.fields.bricks)):
            raise recipe.error(("steps", i, *problem.path), problem.message, problem.hint)
    ids = [step.id for step in recipe.steps if step.id]
    for i, step in enumerate(recipe.steps):
        if step.id and ids.count(step.id) > 1:
            raise recipe.error(("steps", i, "id"), f"two steps have the id '{step.id}'")


def _check_tokenizer(recipe: Recipe) -> None:
    """The `tokenizer` block names base, union or bricks that have a tokenizer and rows."""
    block = recipe.fields.tokenizer
    if block is None:
        return
    if taken := [name for name in ("base", "union", "zero", "mean") if name in recipe.fields.bricks]:
        raise recipe.error(("bricks", taken[0]), f"with a `tokenizer` block no brick can be called {taken[0]}", "Rename it.")
    bricks = {name for name, ref in recipe.fields.bricks.items() if ref.kind != "recipe"}
    named: list[tuple[tuple[str | int, ...], str, tuple[str, ...]]] = [(("source",), block.source, ("base", "union"))]
    for token, rule in block.tokens.items():
        if isinstance(rule.source, TokenRow):
            named.append((("tokens", token, "source", "model"), rule.source.model, ("base",)))
        elif rule.source is not None:
            named.append((("tokens", token, "source"), rule.source, ("base", "zero", "mean")))
    for path, name, words in named:
        if name not in words and name not in bricks:
            text = f"expected {', '.join(words)} or a brick with a tokenizer of its own; found '{name}'. "
            raise recipe.error(("tokenizer", *path), text + nearest(name, [*words, *bricks]))


def _override(document: yamldoc.Document, setting: str) -> None:
    """Apply one `--set`: "mix.density=0.3", "0.lambda=1", "output.dtype=float32", "seed=1"."""
    key, equals, text = setting.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise WorkbenchError(f"--set {setting}: expected FIELD=VALUE or STEP.FIELD=VALUE", "--set mix.density=0.3", 2)
    listed = document.data.get("steps")
    places = [i for i, step in enumerate(listed) if isinstance(step, dict)] if isinstance(listed, list) else []
    ids = {_written_id(listed[i]): i for i in places}
    fields = list(recipe_model().model_fields)
    target: Any = document.data
    path: tuple[str | int, ...] = ()
    if parts[0] in ids or (parts[0].isdecimal() and int(parts[0]) < len(places)):
        at = ids[parts[0]] if parts[0] in ids else places[int(parts[0])]
        target, path = listed[at], ("steps", at)
        parts = parts[1:]
        if not parts:
            raise WorkbenchError(f"--set {setting}: '{key}' is a step; name one of its fields", f"--set {key}.FIELD={text}", 2)
    elif parts[0] not in fields:
        raise WorkbenchError(f"--set {setting}: no step or field '{parts[0]}'. {nearest(parts[0], [*ids, *fields])}", None, 2)
    for part in parts[:-1]:
        inner = target.setdefault(part, {})
        if part == "bricks" and isinstance(inner, list) and all(isinstance(name, str) for name in inner):
            inner = target[part] = dict.fromkeys(inner, 1.0)  # a list of names stands for weights of 1
        target = inner
        if not isinstance(target, dict):
            raise WorkbenchError(f"--set {setting}: '{part}' has no fields", None, 2)
    value = yamldoc.scalar(text)
    target[parts[-1]] = value.data
    document.replace_texts((*path, *parts), value)


def _written_id(step: Mapping[str, Any]) -> str:
    """A step's id as far as unvalidated data tell it."""
    return str(step.get("id") or "-".join(f"{verb}-{step[verb]}" for verb in verbs() if verb in step))


def dump_step(step: BaseModel) -> dict[str, Any]:
    """Return a step as plain data with every default filled in, for keys and records: all fields that decide its numbers."""
    return step.model_dump(mode="json", by_alias=True, exclude={"id", *getattr(step, "unkeyed", ())})


def dump_steps(recipe: Recipe) -> list[dict[str, Any]]:
    """All steps as plain data."""
    return [dump_step(step) for step in recipe.steps]


__all__ = ["FactsEval", "InlineEval", "Output", "Recipe", "RecipeFields", "dump_step", "dump_steps", "find_project", "from_data",
           "load_recipe", "recipe_model", "recipe_schema"]  # fmt: skip
