"""Recipes: loading, strict validation, and the project that they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import BaseModel

from workbench.ground import yamldoc
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.ground.foreign_names import as_name
from workbench.ground.project import find_project
from workbench.ground.recognize import expecting
from workbench.recipe.methods import MethodFinder, methods
from workbench.recipe.schema import RecipeFields, override, recipe_model
from workbench.steps import Step
from workbench.steps.fields import NESTED
from workbench.vocabulary.fields import TokenRow

if TYPE_CHECKING:
    from workbench.steps import RouteMethod


@dataclass(frozen=True)
class Recipe:
    """A valid recipe and its origin.

    Attributes:
        fields: The fields of the file.
        steps: The steps.
        project: Folder that relative paths start from. Runs and the cache are written below it.
        path: The file; None for a recipe made in code.
        document: The parsed file with line numbers, for errors that are found after validation.
        settings: The overrides of `--set`, and the values of a point of a sweep in the same form.
        point: End of the name of a point of a sweep, such as "[lambda=0.5,ties]"; empty for any other recipe.
        notes: What `--set` changed beyond the fields that it names, for the user.
        typed: Words after `workbench run` that make this recipe's result; empty for a recipe made in code.
    """

    fields: RecipeFields
    steps: tuple[Step, ...]
    project: Path
    path: Path | None = None
    document: yamldoc.Document | None = field(default=None, compare=False, repr=False)
    settings: tuple[str, ...] = ()
    point: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)
    typed: tuple[str, ...] = field(default=(), compare=False)

    @property
    def stem(self) -> str:
        """The name without the values of a point of a sweep."""
        return self.fields.name or (self.path.stem if self.path else "recipe")

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.stem + self.point

    @property
    def memory(self) -> Step | None:
        """The memory step at the end of the recipe; None if it has none."""
        last = self.steps[-1] if self.steps else None
        return last if last and last.kind == "memory" else None

    @property
    def router(self) -> RouteMethod | None:
        """The route step at the end of the recipe; None if it has none."""
        last = self.steps[-1] if self.steps else None
        return cast("RouteMethod", last) if last and last.kind == "route" else None

    @property
    def donor(self) -> str | None:
        """The brick that gives the result its tokenizer and is no part of it otherwise; None if there is none."""
        block = self.fields.tokenizer
        return block.source if block and block.missing else None

    @cached_property
    def step_ids(self) -> list[str]:
        """Unique name of each step: its id, or its verb and method, with the step's index if that is not unique."""
        used = {step.id for step in self.steps if step.id}
        default_names = [f"{step.verb}-{step.name}" for step in self.steps]
        names: list[str] = []
        for i, (step, name) in enumerate(zip(self.steps, default_names, strict=True)):
            unique = name if default_names.count(name) == 1 and name not in used else f"{name}-{i}"
            while unique in used and not step.id:
                unique += "-"
            names.append(step.id or unique)
            used.add(names[-1])
        return names

    def used_bricks(self, step: Step) -> list[str]:
        """Return the bricks that a step uses, in order. A merge that lists no bricks uses all but teachers and tokenizer donors."""
        if (names := step.names()) is not None:
            return names
        apart = {self.donor, *(name for other in self.steps for name in other.teacher_bricks())}
        return [name for name in self.fields.bricks if name not in apart]

    @cached_property
    def parents(self) -> list[str]:
        """Names of the bricks that steps use, in the recipe's order."""
        used = {name for step in self.steps for name in self.used_bricks(step)}
        return [name for name in self.fields.bricks if name in used]

    @cached_property
    def whole_models(self) -> list[str]:
        """Names of the bricks that steps use as whole models only, so that they have no delta from the base."""
        apart = [{*step.whole_models(), *step.teacher_bricks()} for step in self.steps]
        deltas = {name for step, names in zip(self.steps, apart, strict=True) for name in set(self.used_bricks(step)) - names}
        return [name for name in self.parents if name not in deltas and name not in self.teachers]

    @cached_property
    def teachers(self) -> list[str]:
        """Names of the bricks that steps only learn from, so that they need not fit the base."""
        others = {name for step in self.steps for name in set(self.used_bricks(step)) - set(step.teacher_bricks())}
        return [name for name in self.parents if name not in others]

    def error(self, path: yamldoc.KeyPath, message: str, hint: str | None = None) -> WorkbenchError:
        """Return an error that points to a field of the recipe, by its path of keys."""
        if self.document:
            return self.document.error(path, message, hint)
        return InvalidRecipeError(f"recipe {self.name}: {message}", hint)

    def without_search(self) -> Recipe:
        """Return the same recipe without its `search`."""
        return replace(self, fields=self.fields.model_copy(update={"search": None}))

    def varied(self, data: dict[str, object], point: str, settings: Iterable[str]) -> Recipe:
        """Return a point of a sweep: the same recipe with other data, whose errors still point into the file.

        Args:
            data: All fields of the point as plain data.
            point: End of the point's name.
            settings: The point's values, in the form of `--set`.

        Raises:
            WorkbenchError: If the data are not a valid recipe.
        """
        place = (
            replace(self.document, data=data, texts={}) if self.document else yamldoc.Document(data, {}, f"recipe {self.name}")
        )
        made = _from_document(place, self.project, self.path, (*self.settings, *settings))
        typed = (self.typed[0].removesuffix(self.point) + point, *self.typed[1:]) if self.typed else ()
        return replace(made, point=point, typed=typed)

    def typed_with(self, changes: Mapping[str, object]) -> tuple[str, ...]:
        """Return the words after `workbench run` for this recipe with other values of some fields; empty for a recipe made in code."""
        settings = (f"{field}={yamldoc.flow(value)}" for field, value in changes.items())
        return (*self.typed, *(word for setting in settings for word in ("--set", setting))) if self.typed else ()

    def derive(self, name: str, steps: Iterable[Mapping[str, object]], bricks: Iterable[str] = ()) -> Recipe:
        """Return a control: a recipe on the same base with other steps, such as one brick alone or the bricks' average."""
        block, output = self.fields.tokenizer, self.fields.output
        # A union vocabulary depends on all bricks: if one were left out, rows would belong to other tokens.
        keep = set(self.fields.bricks) if block else set(bricks)
        data = {
            "version": 1,
            "name": as_name(name),  # that of a file or of facts may have spaces or capitals
            "base": self.fields.base if isinstance(self.fields.base, str) else self.fields.base.model_dump(exclude_none=True),
            "steps": list(steps),
            "seed": self.fields.seed,
            "bricks": {n: b.data() for n, b in self.fields.bricks.items() if n in keep},
            "output": output.model_dump(exclude_none=True, exclude={"form", "config"}) if output.form != "adapter" else {},
            **({"tokenizer": block.model_dump(exclude_none=True)} if block else {}),
        }
        return replace(from_data(data, self.project), typed=self._typed_derived(data))

    def _typed_derived(self, data: Mapping[str, object]) -> tuple[str, ...]:
        """Return the words that make a control: the recipe with other steps, without its sweep, its search and overrides of its own steps."""
        if not self.typed:
            return ()
        changes: dict[str, object] = {"name": data["name"], "steps": data["steps"]}
        changes |= {"sweep": None, "seed": data["seed"]} if self.point else {}
        changes |= {"search": None} if self.fields.search else {}
        if "form" in self.fields.output.model_fields_set:
            unset = self.fields.output.model_dump(exclude_unset=True, exclude_none=True, exclude={"form"})
            changes["output"] = unset if data["output"] else {}
        first = [setting.partition("=")[0].partition(".")[0] for setting in self.typed[2::2]]
        kept = [setting for field, setting in zip(first, self.typed[2::2], strict=True) if field in RecipeFields.model_fields]
        words = (self.typed[0].removesuffix(self.point), *(word for setting in kept for word in ("--set", setting)))
        return replace(self, typed=words).typed_with(changes)


def load_recipe(path: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: The file.
        settings: Overrides as in `--set`: "FIELD=VALUE" or "STEP.FIELD=VALUE", with the id or index of a step.

    Raises:
        WorkbenchError: If the file cannot be read, a field is invalid, or an override names an unknown step or field.
    """
    path = Path(path)
    with expecting(path, "a recipe", "recipe"):
        document = yamldoc.load(path)
        if not isinstance(document.data, dict):
            raise InvalidRecipeError(
                f"{document.path}: expected a mapping with version, base, bricks and steps",
                "`workbench recipe new recipes/NAME.yaml` writes a recipe to start from.",
            )
        settings, project = tuple(settings), find_project(path)
        notes = override(document, settings, project)
        typed = (str(path), *(word for setting in settings for word in ("--set", setting)))
        return replace(_from_document(document, project, path, settings), notes=notes, typed=typed)


def from_data(data: Mapping[str, object], project: Path) -> Recipe:
    """Validate plain data as a recipe of a project."""
    return _from_document(yamldoc.Document(json.loads(json.dumps(data)), {}, f"recipe {data.get('name', '')}"), project, None)


def _from_document(document: yamldoc.Document, project: Path, path: Path | None, settings: tuple[str, ...] = ()) -> Recipe:
    """Validate a document as a recipe, and check the references between its fields."""
    found = []
    for path_of_name, method in MethodFinder(project).used(document.data.get("steps")):
        if isinstance(method, WorkbenchError):
            raise document.error(("steps", *path_of_name), method.message, method.hint) from method
        found.append(method)
    named = tuple(dict.fromkeys(found))
    tags = {method.tag: method for method in named}
    try:
        valid = document.validate(recipe_model(named), tags)
    except InvalidRecipeError:  # only all methods together can tell what was expected
        valid = document.validate(recipe_model(tuple(dict.fromkeys((*methods().values(), *named)))), tags)
    fields, last = valid, valid.steps[-1:]  # type: ignore[attr-defined]
    if "form" not in valid.output.model_fields_set and last and last[0].ends_recipe:  # in a memory or a router
        fields = valid.model_copy(update={"output": valid.output.model_copy(update={"form": "configuration"})})
    steps = [step.completed(list(fields.bricks)) for step in valid.steps]  # type: ignore[attr-defined]
    recipe = Recipe(fields, tuple(steps), project, path, document if path else None, settings)
    _check_tokenizer(recipe)
    _check_last_step(recipe)
    if recipe.fields.search is not None and recipe.fields.sweep is not None:
        text = "a recipe has either a `search`, which chooses values, or a `sweep`, which scores all of them"
        raise recipe.error(("sweep",), text, "Remove one of them.")
    for i, step in enumerate(recipe.steps):
        for problem in step.check_names(recipe.used_bricks(step), list(recipe.fields.bricks)):
            raise recipe.error(("steps", i, *problem.path), problem.message, problem.hint)
    ids = [step.id for step in recipe.steps if step.id]
    for i, step in enumerate(recipe.steps):
        if step.id and ids.count(step.id) > 1:
            raise recipe.error(("steps", i, "id"), f"two steps have the id '{step.id}'", "Give each step an id of its own.")
    return recipe


def _check_last_step(recipe: Recipe) -> None:
    """Raise WorkbenchError if a step follows a memory or a router, or `form` does not fit the recipe's last step."""
    form = recipe.fields.output.form
    for i, step in enumerate(recipe.steps[:-1]):
        if step.ends_recipe:
            thing = "router chooses bricks for" if step.kind == "route" else "memory acts on"
            raise recipe.error(
                ("steps", i + 1),
                f"no step can follow `{step.verb}: {step.name}`, whose {thing} the live model and does not change weights",
                f"Make `{step.verb}: {step.name}` the last step.",
            )
    last = recipe.steps[-1] if recipe.steps else None
    if last is not None and last.ends_recipe and form != "configuration":
        thing = "router" if last.kind == "route" else "memory"
        raise recipe.error(
            ("output", "form"),
            f"the recipe ends in `{last.verb}: {last.name}`, but {'a checkpoint' if form == 'checkpoint' else 'an adapter'} cannot hold a {thing}",
            "Remove `form`: `run` then writes a configuration directory, and `workbench.load(DIR)` loads its model.",
        )
    if form == "configuration" and not (last is not None and last.ends_recipe):
        raise recipe.error(
            ("output", "form"),
            "`form: configuration` needs a memory or a router, but no step makes one",
            "Add a memory such as `edit: memory` or a router such as `route: ridge` as the last step, or write `form: checkpoint`.",
        )


def _check_tokenizer(recipe: Recipe) -> None:
    """Raise WorkbenchError if the `tokenizer` block names anything but `base`, `union` or bricks with their own tokenizer."""
    block = recipe.fields.tokenizer
    if block is None:
        return
    if number := [i for i, step in enumerate(recipe.steps) if step.teacher_bricks()]:
        text = "a recipe with a `tokenizer` block cannot have teachers, whose tokenizers stay as they are"
        hint = "Run the recipe without this step, with `-o DIR`, and use the directory as the base of a second recipe with this step."
        raise recipe.error(("steps", number[0], "teachers"), text, hint)
    if reserved := [name for name in ("base", "union", "zero", "mean") if name in recipe.fields.bricks]:
        text = f"a brick cannot be named '{reserved[0]}' in a recipe with a `tokenizer` block, where this word has a meaning"
        raise recipe.error(("bricks", reserved[0]), text, "Rename the brick.")
    bricks = {name for name, ref in recipe.fields.bricks.items() if ref.kind not in NESTED}
    references: list[tuple[tuple[str | int, ...], str, tuple[str, ...]]] = [(("source",), block.source, ("base", "union"))]
    for token, rule in block.tokens.items():
        if isinstance(rule.source, TokenRow):
            references.append((("tokens", token, "source", "model"), rule.source.model, ("base",)))
        elif rule.source is not None:
            references.append((("tokens", token, "source"), rule.source, ("base", "zero", "mean")))
    for path, name, words in references:
        if name not in words and name not in bricks:
            text = f"expected {', '.join(words)} or a brick with its own tokenizer, found '{name}'. "
            raise recipe.error(("tokenizer", *path), text + nearest(name, [*words, *bricks]))
    if recipe.donor and (step := next((s for s in recipe.steps if recipe.donor in recipe.used_bricks(s)), None)):
        text = (
            f"`missing` is for a brick that gives its tokenizer alone, but `{step.verb}: {step.name}` uses '{recipe.donor}' too"
        )
        raise recipe.error(
            ("tokenizer", "missing"), text, "Remove `missing`: rows of a brick that is merged are aligned by token."
        )


def dump_step(step: BaseModel) -> dict[str, object]:
    """Return the fields that determine a step's result as plain data, defaults and constants included, for keys and records."""
    fields = type(step).model_fields
    unset = {name for name in getattr(step, "keyed_if_set", ()) if getattr(step, name) == fields[name].default}
    dumped = step.model_dump(mode="json", by_alias=True, exclude={"id", *getattr(step, "unkeyed", ()), *unset})
    return {**dumped, **getattr(step, "constants", {})}


def described(recipe: Recipe) -> str:
    """Return the methods of a recipe's steps with their written settings, and lambda: "ties (density 0.2, lambda 1.0)"."""
    steps = []
    for step in recipe.steps:
        fields = {"lam", *step.model_fields_set} - {"id", "bricks", step.verb}
        written = step.model_dump(mode="json", by_alias=True, include=fields)
        entries = step.model_dump(mode="json", exclude_unset=True, include={"bricks"}).get("bricks")
        if isinstance(entries, Mapping) and any(entry not in (1, {}) for entry in entries.values()):
            written["bricks"] = entries
        settings = ", ".join(f"{name} {yamldoc.flow(value)}" for name, value in written.items() if value is not None)
        steps.append(f"{step.name} ({settings})" if settings else step.name)
    return ", then ".join(steps)


def dump_steps(recipe: Recipe) -> list[dict[str, object]]:
    """Return all steps of a recipe as plain data."""
    return [dump_step(step) for step in recipe.steps]
