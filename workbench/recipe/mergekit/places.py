"""Locations of the models that a mergekit file names, and their names and references in a recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError, shell
from workbench.models.architecture import tied_embeddings
from workbench.models.layout import Layout, Model
from workbench.recipe.mergekit.config import Reference
from workbench.recipe.mergekit.text import recipe_text
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
        return name if directory is None else self._in_project(directory)

    def base(self) -> Any:
        """Return the recipe's `base`."""
        model = self.recipe_reference(self.root.model)
        return {"adapter": self.recipe_reference(self.root.lora), "on": model} if self.root.lora else model

    def name(self, reference: Reference) -> str:
        """Return the brick name of a model: the last part of its path, made unique in the recipe."""
        key = str(reference)
        if key not in self.names:
            last = Path((reference.lora or reference.model).partition("@")[0]).name.lower()
            default_name = re.sub(r"[^a-z0-9._-]+", "-", last).strip("._-") or "model"
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
        if whole or self.root.lora:
            return {"recipe": self._adapted(name, reference), **({} if whole else {"any_base": True})}
        return {"recipe": self._summed(name, reference)}

    def _adapted(self, name: str, reference: Reference) -> str:
        """Add a recipe of a model with its adapter as the base; return the path of its file."""
        assert reference.lora is not None
        base = {"adapter": self.recipe_reference(reference.lora), "on": self.recipe_reference(reference.model)}
        return self._add(name, reference, {"version": 1, "base": base, "steps": []})

    def _summed(self, name: str, reference: Reference) -> str:
        """Add a recipe that sums a model's delta and the delta of an adapter on it; return the path of its file."""
        assert reference.lora is not None
        tuned = "model" if name != "model" else "tuned"
        data = {
            "version": 1,
            "base": self.base(),
            "bricks": {tuned: self.recipe_reference(reference.model), name: {"adapter": self.recipe_reference(reference.lora)}},
            "steps": [{"merge": "task_arithmetic", "bricks": {tuned: 1.0, name: 1.0}}],
        }
        return self._add(name, reference, data)

    def _add(self, name: str, reference: Reference, data: Mapping[str, Any]) -> str:
        """Add a recipe of an input; return the path of its file, relative to the project."""
        assert self.to is not None
        path = self.to.with_name(f"{self.to.stem}-{name}.yaml")
        head = [f"# workbench run {shell(path)}", f"# {reference.model} with its adapter, an input of {self.to.name}."]
        self.extra[path] = recipe_text(data, head)
        return self._in_project(Path(os.path.normpath(Path.cwd() / path)))

    def stage_path(self, name: str) -> Path:
        """Return the recipe file of an earlier document."""
        assert self.to is not None
        return self.to.with_name(f"{self.to.stem}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.yaml")

    def in_project(self, path: Path) -> str:
        """Return a file's path relative to the project, or its absolute path if it is outside."""
        return self._in_project(Path(os.path.normpath(Path.cwd() / path)))

    def _in_project(self, path: Path) -> str:
        project = Path(os.path.normpath(self.project))
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
