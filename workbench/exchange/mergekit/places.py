"""Locations of the models that a mergekit file names, their names in a recipe, the order of its documents, and the text of the recipe."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.exchange.mergekit.config import Reference
from workbench.ground import yamldoc
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, shell
from workbench.ground.foreign_names import as_name
from workbench.models.architecture import tied_embeddings
from workbench.models.layout import Layout, Model
from workbench.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Named:
    """Tensor names of a model with their layers.

    Attributes:
        layout: The layers.
        tied: Whether the head is tied to the embeddings.
    """

    layout: Layout
    tied: bool


@dataclass(frozen=True)
class Stage:
    """An earlier document of the same file, whose result is a model of later documents.

    Attributes:
        recipe: Its recipe, relative to the project.
        root: The base of this recipe.
        names: Tensor names of the result; None if the base is not local.
    """

    recipe: str
    root: Reference
    names: Named | None


@dataclass
class Places:
    """Locations of models. Paths of mergekit start at the working directory, paths of a recipe at its project."""

    file: Path
    project: Path
    to: Path | None
    stages: Mapping[str, Stage] = field(default_factory=dict)
    """Name -> earlier document of the file."""
    root: Reference = field(default_factory=lambda: Reference(""))
    """The recipe's base."""
    names: dict[str, str] = field(default_factory=dict)
    """Reference -> brick name."""
    reserved: tuple[str, ...] = ()
    """Words that no brick may have as its name."""
    extra: dict[Path, str] = field(default_factory=dict)
    """File -> text of other recipes."""
    _references: dict[str, Reference] = field(default_factory=dict)
    _known: dict[str, Model | None] = field(default_factory=dict)

    def find(self, name: str) -> Path | None:
        """Return a model's local directory: relative to the working directory as in mergekit, else next to the YAML file."""
        if name in self.stages:
            return None
        path = Path(name).expanduser()
        for start in (Path.cwd(), self.file.resolve().parent):
            if (start / path).is_dir():
                return Path(os.path.normpath(start / path))
        return None

    def model(self, reference: Reference) -> Model | None:
        """Return a model from its headers; None for an earlier document, or if it cannot be read."""
        name = reference.model
        if name not in self._known:
            self._known[name] = _model(self.find(name))
        return self._known[name]

    def named(self, reference: Reference) -> Named | None:
        """Return the tensor names of a model or of an earlier document; None if they are not known."""
        if reference.model in self.stages:
            return self.stages[reference.model].names
        model = self.model(reference)
        return None if model is None else Named(model.layout, tied_embeddings(model.weights.specs, model.config) is not None)

    def recipe_reference(self, name: str) -> str:
        """Return a model's reference for the recipe: a path relative to the project, an absolute path, or a hub id."""
        directory = self.find(name)
        return name if directory is None else self.in_project(directory)

    def base(self) -> Any:
        """Return the recipe's `base`."""
        model = self.recipe_reference(self.root.model)
        return {"adapter": self.recipe_reference(self.root.lora), "on": model} if self.root.lora else model

    def name(self, reference: Reference) -> str:
        """Return the brick name of a model: the last part of its path, made unique in the recipe."""
        key = str(reference)
        if key not in self.names:
            default_name = as_name(Path((reference.lora or reference.model).partition("@")[0]).name) or "model"
            default_name = f"{default_name}-model" if default_name in self.reserved else default_name
            used, number, name = set(self.names.values()), 1, default_name
            while name in used:
                number += 1
                name = f"{default_name}-{number}"
            self.names[key] = name
            self._references[name] = reference
        return self.names[key]

    def brick(self, name: str, whole: bool) -> Any:
        """Return a brick's reference for the recipe.

        Args:
            name: The brick.
            whole: Whether the recipe uses it as a whole model, which needs no common base.
        """
        reference = self._references[name]
        if reference.model in self.stages:
            stage = self.stages[reference.model]
            return {"recipe": stage.recipe, **({} if whole or stage.root == self.root else {"any_base": True})}
        if not reference.lora:
            return self.recipe_reference(reference.model)
        if reference.model == self.root.model and not self.root.lora:
            return {"adapter": self.recipe_reference(reference.lora)}
        model, adapter = self.recipe_reference(reference.model), self.recipe_reference(reference.lora)
        if whole or self.root.lora:  # the model with its adapter as the base
            data: dict[str, object] = {"version": 1, "base": {"adapter": adapter, "on": model}, "steps": []}
            return {"recipe": self._add(name, reference, data), **({} if whole else {"any_base": True})}
        # The sum of the model's delta and the delta of the adapter on it.
        tuned = "model" if name != "model" else "tuned"
        data = {
            "version": 1,
            "base": self.base(),
            "bricks": {tuned: model, name: {"adapter": adapter}},
            "steps": [{"merge": "task_arithmetic", "bricks": {tuned: 1.0, name: 1.0}}],
        }
        return {"recipe": self._add(name, reference, data)}

    def _add(self, name: str, reference: Reference, data: Mapping[str, object]) -> str:
        """Add a recipe of an input; return the path of its file, relative to the project."""
        assert self.to is not None
        path = self.to.with_name(f"{self.to.stem}-{name}.yaml")
        head = [f"# workbench run {shell(path)}", f"# {reference.model} with its adapter, an input of {self.to.name}."]
        self.extra[path] = recipe_text(data, head)
        return self.in_project(path)

    def stage_path(self, name: str) -> Path:
        """Return the recipe file of an earlier document."""
        assert self.to is not None
        return self.to.with_name(f"{self.to.stem}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.yaml")

    def in_project(self, path: Path) -> str:
        """Return a file's path relative to the project, or its absolute path if it is outside."""
        path, project = Path(os.path.normpath(Path.cwd() / path)), Path(os.path.normpath(self.project))
        return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)


def _model(path: Path | None) -> Model | None:
    """Return a model from its headers; None if it cannot be read."""
    if path is None:
        return None
    try:
        checkpoint = Checkpoint(path, "base")
        model = Model(checkpoint, checkpoint.config)
        _ = model.layout
    except WorkbenchError:
        return None
    return model


def in_order(documents: list[yamldoc.Document], to: Path | None) -> list[tuple[str, yamldoc.Document]]:
    """Return the documents with their names, each after those that it uses; the result comes last.

    The result is the document without a name; if all have one, it is the last of the file.

    Raises:
        WorkbenchError: If there is no output file, names repeat, two documents have no name, or documents use each other in a circle.
    """
    if to is None:
        raise documents[1].error(
            (),
            f"the file has {len(documents)} documents, which become {len(documents)} recipes",
            "Name the file of the last one with -o.",
        )
    named: dict[str, yamldoc.Document] = {}
    for document in documents:
        data = document.data
        if not isinstance(data, Mapping) or "merge_method" not in data:
            raise document.error((), "expected a mergekit configuration with a merge_method", "Give a file for `mergekit-multi`.")
        name = str(data.get("name") or "")
        if name in named:
            what = f"two documents are called '{name}'" if name else "two documents have no name"
            raise document.error(("name",), f"{what}; mergekit rejects this too", "Add `name:` to all but the last document.")
        named[name] = replace(document, data={key: value for key, value in data.items() if key != "name"})
    uses = {name: [other for other in named if other and other in set(_texts(document.data))] for name, document in named.items()}
    order: list[str] = []
    for name in named:
        _visit(name, uses, order, ())
    result = "" if "" in named else list(named)[-1]
    order.sort(key=lambda name: name == result)
    if any(result in uses[name] for name in order):
        raise documents[-1].error((), f"'{result}' is used by another document, so it is not the result", "Move it to the front.")
    return [(name if name != result else "", named[name]) for name in order]


def _visit(name: str, uses: Mapping[str, list[str]], order: list[str], above: tuple[str, ...]) -> None:
    """Append a document to `order` after those that it uses."""
    if name in above:
        raise InvalidRecipeError(
            f"documents use each other: {' -> '.join((*above[above.index(name) :], name))}", "Remove one of these uses."
        )
    if name in order:
        return
    for other in uses[name]:
        _visit(other, uses, order, (*above, name))
    order.append(name)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a document, and the model in references such as MODEL+LORA."""
    if isinstance(value, str):
        yield value.partition("+")[0].partition("@")[0]
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(inner)


_BLOCKS = ("bricks", "parameters")
WIDTH = 130


def comment(text: str) -> str:
    """Return a YAML comment, wrapped if it is long."""
    return "\n".join(textwrap.wrap(text, WIDTH, initial_indent="# - ", subsequent_indent="#   ", break_long_words=False))


def recipe_text(data: Mapping[str, object], head: Iterable[str]) -> str:
    """Return the text of a recipe: head lines, then fields. Mappings of bricks and lists of rules have one entry per line."""
    lines = list(head)
    for key, value in data.items():
        lines += _field(key, value, "")
    return "\n".join(lines) + "\n"


def _field(key: str, value: Any, indent: str) -> list[str]:
    """Return the lines of a field; some mappings and lists of rules are written as blocks."""
    head = f"{indent}{_inline(key)}:"
    if isinstance(value, dict) and value and (key in _BLOCKS or _has_rules(value)):
        return [head, *(line for name, inner in value.items() for line in _field(name, inner, indent + "  "))]
    if _is_rules(value):
        entries = []
        for entry in value:
            if "merge" in entry or ("grow" in entry and len(_inline(entry)) > WIDTH - 10):
                first, *rest = (line for k, v in entry.items() for line in _field(k, v, indent + "    "))
                entries += [f"{indent}  - {first.strip()}", *rest]
            else:
                entries.append(f"{indent}  - {_inline(entry)}")
        return [head, *entries]
    return [f"{head} {_inline(value)}"]


def _is_rules(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _has_rules(value: Any) -> bool:
    return _is_rules(value) or (isinstance(value, dict) and any(_has_rules(inner) for inner in value.values()))


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yamldoc.dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()
